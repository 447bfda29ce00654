"""The rows of a run, one a logged step: ``metrics.jsonl``, and whoever else takes them."""

from __future__ import annotations

import errno
import json
import logging
import os
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
    """One that is closed at the run's end."""

    def close(self) -> None:
        """Write what is left; no row comes after it."""
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
            self._try(sink, lambda sink=sink: sink.write(self._log.rows[-1]))  # type: ignore[misc]

    def close(self) -> None:
        """Close the sinks."""
        for sink in list(self._sinks):
            self._try(sink, sink.close)

    def _try(self, sink: Sink, work: Callable[[], None]) -> None:
        """Do a sink's work; one that fails is warned of, and gets no more."""
        try:
            work()
        except Exception as error:  # whatever another project's writer raises, the run goes on
            self._sinks.remove(sink)
            reason = " ".join(str(error).split()) or type(error).__name__
            _log.warning("%s gets no more rows (%s): metrics.jsonl has them all", type(sink).__name__, reason)


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
