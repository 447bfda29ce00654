"""Where derived files are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory(configured: str = "") -> Path:
    """Return the folder for derived files: the configured one, or ``$XDG_CACHE_HOME/scinet`` (``~/.cache/scinet``)."""
    if configured:
        return Path(configured).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "scinet"
