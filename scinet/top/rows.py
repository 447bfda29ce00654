"""The newest rows of a ``metrics.jsonl`` that grows, however large it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

LARGEST = 10**15  # of any figure that is shown: beyond it stands nonsense, and arithmetic that overflows
_MOST_BYTES = 4 << 20


class Rows:
    """What is worth showing of a run's rows, brought up to date at each look by reading what was added."""

    def __init__(self, path: Path) -> None:
        """Take the file, which need not exist yet."""
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self._inode, self._offset = 0, 0
        self.step = 0
        self.training: dict[str, Any] = {}
        self.holdout: dict[str, Any] = {}
        self.best_map: float | None = None
        self.changed_at = 0.0

    def follow(self) -> None:
        """Read on; of more than a few MiB the newest. A file that was replaced, as on resuming, is read anew."""
        if not self._path.is_file():  # a pipe would never open
            self._forget()
            return
        try:
            with self._path.open("rb") as file:
                state = os.fstat(file.fileno())
                if state.st_ino != self._inode or state.st_size < self._offset:
                    self._forget()
                self._inode, self.changed_at = state.st_ino, state.st_mtime
                begin = max(self._offset, state.st_size - _MOST_BYTES)
                file.seek(begin)
                read = file.read(_MOST_BYTES)
        except OSError:
            self._forget()
            return
        is_cut = begin > self._offset
        whole, newline, _ = read.rpartition(b"\n")
        self._offset = begin + len(whole) + len(newline)
        for line in whole.split(b"\n")[1 if is_cut else 0 :]:
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(row, dict) or (step := number(row, "step")) is None:
            return
        self.step = int(step)
        score = number(row, "holdout_map")
        if score is None:
            self.training = row
        else:
            self.holdout, self.best_map = row, max(score, self.best_map or score)


def number(row: dict[str, Any], key: str) -> float | None:
    """Return a number of a row, or None for anything else."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -LARGEST <= value <= LARGEST else None
