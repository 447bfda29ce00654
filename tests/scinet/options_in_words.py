"""A tree of options as lines that a diff shows well."""

from __future__ import annotations

import enum

from scinet import config


def in_words(section: type) -> list[str]:
    """Return a line for each option: its default, and the numbers or words that it may be instead."""
    defaults = section()
    lines = []
    for key, item, kind in config.fields(section):
        value = defaults
        for part in key.split("."):
            value = getattr(value, part)
        line = f"{key} = {getattr(value, 'value', value)!r}"
        low, high = item.metadata["low"], item.metadata["high"]
        if low is not None or high is not None:
            line += f"  # {low} .. {'' if high is None else high}".rstrip()
        elif isinstance(kind, type) and issubclass(kind, enum.Enum):
            line += f"  # {' '.join(member.value for member in kind)}"
        lines.append(line)
    return lines
