"""How one option of the configuration is declared: its default, its description and the range it must lie in."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, description: str, *, low: float | None = None, high: float | None = None) -> Any:
    """Return a dataclass field with its description and, for numbers, the closed range it must lie in."""
    metadata = {"description": description, "low": low, "high": high}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)
