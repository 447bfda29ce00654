"""Times of parts of a step that nobody waits for: by the host's clock, on a GPU by events in its stream."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType

import torch


class Stopwatch:
    """``with stopwatch:`` times a part; :meth:`take` gives what has ended.

    On a GPU the time is between two events in the stream, read once the device has passed them, often a step later.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin with nothing timed."""
        self._on_gpu = device.type == "cuda"
        self._started_s = 0.0
        self._begun: torch.cuda.Event | None = None
        self._taken: list[float] = []
        self._passing: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __enter__(self) -> None:
        """Begin a part."""
        if self._on_gpu:
            self._begun = self._event()
        else:
            self._started_s = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        if self._begun is not None:
            self._passing.append((self._begun, self._event()))
        else:
            self._taken.append(time.perf_counter() - self._started_s)

    def take(self) -> list[float]:
        """Return the seconds of the parts that have ended since the last call; never waits for the device."""
        while self._passing and self._passing[0][1].query():  # type: ignore[no-untyped-call]
            begun, ended = self._passing.popleft()
            self._taken.append(begun.elapsed_time(ended) / 1e3)
        taken, self._taken = self._taken, []
        return taken

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
