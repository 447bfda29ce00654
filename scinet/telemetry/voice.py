"""What a run says while it goes on: messages, and a progress bar or plain lines."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


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


def configure_logging(is_first: bool) -> None:
    """Set up logging for a command: INFO from the first rank, warnings from all."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname).1s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("scinet").setLevel(logging.INFO if is_first else logging.WARNING)
