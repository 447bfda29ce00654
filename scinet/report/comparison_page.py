"""stub"""

from pathlib import Path
from typing import Any


def write(directory: Path, tree: dict[str, Any]) -> Path:
    """x"""
    return directory / "comparison.html"
