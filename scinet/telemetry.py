"""What a run says while it goes on: ``metrics.jsonl``, and a progress bar or plain lines."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0

_log = logging.getLogger(__name__)


class Voice(Protocol):
    """Where messages and progress go; silent on all ranks but the first."""

    def say(self, message: str) -> None:
        """Show one line."""
        ...

    def progress(self, task: str, done: int, total: int, detail: str = "") -> None:
        """Show how far a task is."""
        ...


class Silence:
    """The voice of every rank but the first."""

    def say(self, message: str) -> None:
        """Say nothing."""

    def progress(self, task: str, done: int, total: int, detail: str = "") -> None:
        """Show nothing."""


class Terminal:
    """Progress bars on a terminal, plain lines elsewhere, both on standard error."""

    def __init__(self) -> None:
        """Look whether standard error is a terminal."""
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._bars: Progress | None = None
        self._tasks: dict[str, Any] = {}
        self._last_line = 0.0
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total}"),
            )
            self._bars = Progress(
                *columns, TimeRemainingColumn(), TextColumn("{task.fields[detail]}"), console=self._console
            )

    def __enter__(self) -> Terminal:
        """Start drawing."""
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""
        if self._bars is not None:
            self._bars.stop()

    def say(self, message: str) -> None:
        """Show one line."""
        self._console.print(message, markup=False)

    def progress(self, task: str, done: int, total: int, detail: str = "") -> None:
        """Move a bar, or print a line every few seconds and at the end."""
        if self._bars is not None:
            if task not in self._tasks:
                self._tasks[task] = (self._bars.add_task(task, total=total, detail=detail), total)
            self._bars.update(self._tasks[task][0], completed=min(done, total), detail=detail)
            return
        now = time.monotonic()
        if done >= total or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(f"{task} {min(done, total)}/{total} {detail}".rstrip())


class MetricsLog:
    """``metrics.jsonl``: one object a logged step, flushed at once so that a killed run keeps its history.

    While the disk is full, training goes on and the rows wait.
    """

    def __init__(self, path: Path | None) -> None:
        """Append to the file; None keeps the rows in memory only."""
        self._path = path
        self.rows: list[dict[str, Any]] = read_metrics(path) if path is not None and path.is_file() else []
        self._num_written = len(self.rows)

    def write(self, row: dict[str, Any]) -> None:
        """Add one object; numbers that are not finite become null."""
        self.rows.append({key: _finite(value) for key, value in row.items()})
        is_first_to_wait = self._num_written == len(self.rows) - 1
        try:
            self.catch_up()
        except OSError as error:
            if is_first_to_wait:
                _log.warning("%s cannot be written (%s): its rows wait in memory", self._path, error.strerror)

    def catch_up(self) -> None:
        """Append the rows that the file lacks, all of them or none.

        Raises:
            OSError: if the disk is still full.
        """
        waiting = self.rows[self._num_written :]
        if self._path is not None and waiting:
            data = "".join(json.dumps(row) + "\n" for row in waiting).encode()
            with self._path.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(data) < len(data):
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self._num_written = len(self.rows)

    def rewind(self, step: int) -> None:
        """Drop the rows after a step: a resumed run goes through those steps once more."""
        self.rows = kept = [row for row in self.rows if row["step"] <= step]
        if self._path is not None and self._path.is_file():
            temporary = self._path.with_name(f".{self._path.name}.part")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            temporary.replace(self._path)
        self._num_written = len(kept)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``metrics.jsonl``; the last one may be cut off where a run was killed, and is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def configure_logging(is_first: bool) -> None:
    """Set up logging for a command: INFO from the first rank, warnings from all."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname).1s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("scinet").setLevel(logging.INFO if is_first else logging.WARNING)
