"""Rows as TensorBoard's events, in a file of the run directory; a resumed run adds one to the same folder."""

from __future__ import annotations

import logging
import os
import platform
import struct
import time
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from scinet.telemetry.rows import append

_log = logging.getLogger(__name__)


class TensorBoard:
    """One event file, written a row at a time; while the disk is full, its rows wait.

    tensorboardX's own writer hands events to a thread through a short queue, which a full disk would fill for good.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, step: int) -> None:
        """Begin a file; events after ``step`` that are there already belong to steps that are taken again."""
        host = platform.node()
        self._path = folder / f"events.out.tfevents.{time.time():.6f}.{host}.{os.getpid()}"
        self._waiting = b""
        self._has_failed = False
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._add(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, row: dict[str, Any]) -> None:
        """Add the numbers of a row, each under its name."""
        for name, value in row.items():
            if name != "step" and value is not None:
                self._add(Event(wall_time=time.time(), step=row["step"], summary=scalar(name, value)))
        try:
            self._path.parent.mkdir(exist_ok=True)
            append(self._path, self._waiting)
            self._waiting = b""
        except OSError as error:
            if not self._has_failed:
                _log.warning("%s cannot be written (%s): its rows wait in memory", self._path, error.strerror)
            self._has_failed = True

    def close(self, patience_s: float) -> None:
        """Nothing is left to write."""

    def _add(self, event: Event) -> None:
        data = event.SerializeToString()
        size = struct.pack("<Q", len(data))
        self._waiting += b"".join(
            (size, struct.pack("<I", masked_crc32c(size)), data, struct.pack("<I", masked_crc32c(data)))
        )
