"""How often this process has tried a source again, its loader processes included, whose counts come with their parcels.

One thread of a process reads its sources, so the count needs no lock, which a process that is killed could leave shut.
"""

from __future__ import annotations

_count = 0


def add(number: int = 1) -> None:
    """Count attempts after a first one that failed."""
    global _count
    _count += number


def total() -> int:
    """Return how many there were."""
    return _count


def take() -> int:
    """Return how many there were, and begin anew."""
    global _count
    taken, _count = _count, 0
    return taken
