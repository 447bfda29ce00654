"""Tables and sizes for a terminal, whose words come from strangers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_WIDEST_CELL = 160


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return rows as aligned columns; whole numbers are set to the right, what does not print is escaped."""
    lines = [[printable(str(cell)) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    is_number = [all(line[column].isdigit() for line in lines[1:]) for column in range(len(header))]
    shown = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "".join(f"{line}\n" for line in shown)


def is_unicode(text: str) -> bool:
    """Tell whether a text can be written at all: JSON may hold half of a pair of surrogates."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def printable(text: str, *, limit: int = _WIDEST_CELL) -> str:
    """Return a text that no terminal obeys: letters that do not print are escaped, and its end is cut."""
    safe = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"


def size(num_bytes: float) -> str:
    """Return a size in the unit that suits it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"
