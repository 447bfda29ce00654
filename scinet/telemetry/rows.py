"""The rows of a run, one a logged step: ``metrics.jsonl``, and whoever else takes them."""

from __future__ import annotations

import errno
import json
import logging
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

_log = logging.getLogger(__name__)


class Rows(Protocol):
    """Takes a run's rows."""

    def write(self, row: dict[str, Any]) -> None:
        """Take one; its values are numbers, or None where there is none to give."""
        ...


class Sink(Rows, Protocol):
    """One that has a name for messages, and is closed at the run's end."""

    @property
    def name(self) -> str:
        """What a user calls it."""
        ...

    def close(self, patience_s: float) -> None:
        """Write what is left, within a time; no row comes after it."""
        ...


class Fan:
    """Hands every row to ``metrics.jsonl`` and to the sinks beside it; none of these can end a run."""

    def __init__(self, log: MetricsLog) -> None:
        """Begin with no sink beside the file."""
        self._log = log
        self._sinks: list[Sink] = []

    def add(self, sink: Sink) -> None:
        """Hand the rows from now on to a sink too."""
        self._sinks.append(sink)

    def write(self, row: dict[str, Any]) -> None:
        """Hand on one row."""
        self._log.write(row)
        for sink in list(self._sinks):
            if not _works(lambda sink=sink: sink.write(self._log.rows[-1]), sink.name):  # type: ignore[misc]
                self._sinks.remove(sink)

    def close(self, patience_s: float) -> None:
        """Close the sinks, each within a time."""
        for sink in self._sinks:
            _works(lambda sink=sink: sink.close(patience_s), sink.name)  # type: ignore[misc]


class Background:
    """A sink that may wait for a network: it works in a thread of its own, and the training goes on."""

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        """Begin to make the sink of this name."""
        self.name, self._make = name, make
        self._waiting: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._patience_s = 0.0
        self._thread = threading.Thread(target=self._run, name="sink", daemon=True)
        self._thread.start()

    def write(self, row: dict[str, Any]) -> None:
        """Leave a row for the thread."""
        if self._thread.is_alive():
            self._waiting.put(row)

    def close(self, patience_s: float) -> None:
        """Wait until the rows are written, or patience ends.

        Raises:
            TimeoutError: if it does.
        """
        self._patience_s = patience_s
        self._waiting.put(None)
        self._thread.join(patience_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the last rows are not taken within {patience_s:g} s")

    def _run(self) -> None:
        made: list[Sink] = []
        if not _works(lambda: made.append(self._make()), self.name):
            return
        while (row := self._waiting.get()) is not None:
            if not _works(lambda row=row: made[0].write(row), self.name):  # type: ignore[misc]
                return
        _works(lambda: made[0].close(self._patience_s), self.name)


def _works(work: Callable[[], None], name: str) -> bool:
    """Do a sink's work and return whether it went well; a warning says if not."""
    try:
        work()
    except Exception as error:  # whatever another project's writer raises, the run goes on
        reason = " ".join(str(error).split()) or type(error).__name__
        _log.warning("%s gets no more rows (%s): metrics.jsonl has them all", name, reason)
        return False
    return True


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
            append(self._path, "".join(json.dumps(row) + "\n" for row in waiting).encode())
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


def append(path: Path, data: bytes) -> None:
    """Append all of the data to a file, or nothing.

    Raises:
        OSError: if the disk is full.
    """
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        if file.write(data) < len(data):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
