"""How the ranks' figures reach rank 0: each leaves its text on the notes' board, from a thread, and rank 0 collects.

No collective, and nobody waits: a rank that is gone leaves its last text. Whether it lives is judged by rank 0's clock,
by a count that its note carries on.
"""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric

from scinet.distributed import Ranks
from scinet.telemetry.exposition import merged, render

_GRACE_S = 5.0
_MISSED = 3

_log = logging.getLogger(__name__)


class Board(Protocol):
    """Where ranks leave notes for each other, as :class:`scinet.notes.Notes` does; nobody waits long."""

    def put(self, key: str, text: str) -> None:
        """Leave a text."""
        ...

    def get_many(self, keys: Sequence[str]) -> dict[str, str]:
        """Return the texts there are."""
        ...


@dataclass
class _Sign:
    """The last sign of life of a rank: its count, where it runs, when it came by both clocks of rank 0."""

    count: int
    host: str
    heard_s: float
    heard_at: float


def note(count: int, host: str, text: str) -> str:
    """Return what a rank leaves: a count that grows with each note, where it runs, and its figures."""
    return f"{count}\n{host}\n{text}"


class Exchange:
    """This rank's part: tells its figures, and on rank 0 makes one text of all."""

    def __init__(
        self,
        registry: CollectorRegistry,
        ranks: Ranks,
        notes: Board,
        publish: Callable[[str], None],
        *,
        refresh_s: float,
        shares: bool,
    ) -> None:
        """Publish this rank's first text; :meth:`start` goes on.

        Args:
            registry: of this rank's figures.
            ranks: this process.
            notes: a board of its own.
            publish: takes each text, ready to be served.
            refresh_s: time between two.
            shares: whether rank 0 tells the others' figures too, or only whether they live.
        """
        self._registry, self._ranks, self._notes, self._publish = registry, ranks, notes, publish
        self._refresh_s, self._shares = refresh_s, shares
        self.count = 0
        now = time.monotonic()
        self._signs = {rank: _Sign(0, "", now, time.time()) for rank in range(ranks.world_size)}
        self._others: dict[int, str] = {}
        self._has_failed = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._try(lambda: publish(self._text()))

    def start(self) -> None:
        """Begin to exchange."""
        self._thread.start()

    def close(self) -> None:
        """End, and publish the last figures of this rank with what the others have told."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._try(lambda: self._publish(self._text()))

    def _run(self) -> None:
        while True:
            self._try(self.refresh)
            if self._ended.wait(self._refresh_s):
                return

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # a mistake here is ours, and no reason to end a training
            if not self._has_failed:
                _log.warning("the figures for Prometheus are not refreshed: %s: %s", type(error).__name__, error)
            self._has_failed = True

    def refresh(self) -> None:
        """Tell this rank's figures, and on rank 0 take the others'."""
        self.count += 1
        if self._ranks.is_first:
            self._hear()
            self._publish(self._text())
            return
        own = self._text()
        self._notes.put(str(self._ranks.rank), note(self.count, platform.node(), own if self._shares else ""))
        self._publish(own)

    def _hear(self) -> None:
        """Take what the other ranks have left."""
        notes = self._notes.get_many([str(rank) for rank in range(1, self._ranks.world_size)])
        for rank, told in ((int(key), told) for key, told in notes.items()):
            count, host, text = told.split("\n", 2)
            if int(count) != self._signs[rank].count:
                self._signs[rank] = _Sign(int(count), host, time.monotonic(), time.time())
                self._others[rank] = text

    def _text(self) -> str:
        own = render(self._registry.collect())
        if not self._ranks.is_first:
            return own
        self._signs[0] = _Sign(self.count, platform.node(), time.monotonic(), time.time())
        return merged([own, *(self._others[rank] for rank in sorted(self._others)), render(self._lives())])

    def _lives(self) -> Iterator[Metric]:
        """Yield which ranks live; one that was never heard counts as alive for as long as one that fell silent."""
        longest_s = _MISSED * self._refresh_s + _GRACE_S
        now = time.monotonic()
        up = GaugeMetricFamily(
            "scinet_rank_up", f"Whether a rank gave a sign of life in the last {longest_s:g} s", labels=["rank", "host"]
        )
        heard = GaugeMetricFamily(
            "scinet_rank_heartbeat_timestamp_seconds", "When it gave the last, by the clock of rank 0", labels=["rank"]
        )
        for rank, sign in self._signs.items():
            up.add_metric([str(rank), sign.host], float(now - sign.heard_s <= longest_s))
            heard.add_metric([str(rank)], sign.heard_at)
        yield from (up, heard)
