"""``scinet bench scrape``: what looking at a run costs its training, by steps with and without a client that scrapes.

The client is a process of its own, as Prometheus is. Turns alternate, so that a busy machine troubles both alike. Of
more ranks than one, the lines of the others are made up and come by notes as they would.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection

import torch

from scinet import config, materials
from scinet.data.share import share_of
from scinet.distributed import Ranks, initialise, shut_down
from scinet.errors import ConfigError
from scinet.options import Method, Options
from scinet.pairing import Verdict, synchronise, table, take_turns
from scinet.telemetry import MetricsLog, Silence
from scinet.telemetry.endpoint import PATH, Endpoint
from scinet.telemetry.exchange import Exchange, note
from scinet.telemetry.exposition import render
from scinet.telemetry.figures import Figures, RunFigures
from scinet.trainer import Trainer

_MOST_MS = 1.0
_LONGEST_ANSWER_S = 60.0


@dataclass(frozen=True)
class Setting:
    """How it is measured: turns, steps of a turn, scrapes a second, and of how many ranks the text is."""

    repeats: int
    steps: int
    rate: float
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class _Watch:
    """A run that can be scraped: its exchange and endpoint, and the size of the text."""

    exchange: Exchange
    endpoint: Endpoint
    num_bytes: int


def report(options: Options, setting: Setting, say: Callable[[str], None]) -> str:
    """Return the training time of a scrape, and the processor time of serving and refreshing, as a Markdown table.

    Args:
        options: of the run; its own steps are timed, on its first batch.
        setting: how.
        say: told what is being done.

    Raises:
        ConfigError: if nothing is trained, or data or weights cannot be had.
    """
    if options.method is Method.zero_shot:
        raise ConfigError("method=zero_shot trains nothing: there is no step that a scrape could hold up")
    ranks = initialise(options.train.collective_timeout_s)
    try:
        # the schedule must not end before the measurement
        endless = config.replace(options, train__epochs=10**6, train__max_steps=0, loss__warmup_fraction=0.0)
        made = materials.gather(endless, ranks, lambda *_: None)
        figures = RunFigures(endless, ranks)
        trainer = Trainer(endless, made, ranks, MetricsLog(None), Silence())
        batches = made.training(endless, share_of(endless, ranks.rank, ranks.world_size)).epoch(0)
        micro = [batch.to(ranks.device) for batch in islice(batches, endless.train.accumulation_steps)]

        def train() -> None:
            for _ in range(setting.steps):
                started = time.monotonic()
                trainer.train_step(micro, endless.train.global_batch_size)
                figures.stand(trainer.standing)
                figures.step(seconds=time.monotonic() - started, waited_s=0.0, fusion_s=[])

        train()
        verdicts = []
        for number in setting.ranks:
            with _watched(figures, ranks, number, options.telemetry.refresh_s) as watch:
                verdicts += _compare(train, watch, setting, number, lambda: synchronise(ranks.device), say)
        return _title(options, setting) + table(verdicts)
    finally:
        shut_down()


def _title(options: Options, setting: Setting) -> str:
    return (
        f"{options.method.value}, G = {options.train.global_batch_size}, {setting.steps} steps a turn, "
        f"{setting.repeats} turns with and as many without a client that scrapes {setting.rate:g} times a second, "
        f"telemetry.refresh_s={options.telemetry.refresh_s:g}, threads: {torch.get_num_threads()}; milliseconds.\n\n"
    )


@contextlib.contextmanager
def _watched(figures: RunFigures, ranks: Ranks, number: int, refresh_s: float) -> Iterator[_Watch]:
    """Serve the figures as rank 0 of so many ranks does."""
    endpoint = Endpoint("127.0.0.1", 0)
    of_all = Ranks(0, number, ranks.device)
    exchange = Exchange(figures.registry, of_all, _Board(number), endpoint.publish, refresh_s=refresh_s, shares=True)
    exchange.refresh()
    exchange.start()
    endpoint.start()
    try:
        with urllib.request.urlopen(f"http://{endpoint.target}{PATH}", timeout=_LONGEST_ANSWER_S) as answer:
            yield _Watch(exchange, endpoint, len(answer.read()))
    finally:
        exchange.close()
        endpoint.close()


class _Board:
    """Notes on which other ranks leave lines as a real one does, a new one at every look."""

    def __init__(self, number: int) -> None:
        self._looks = 0
        self._texts = {}
        for rank in range(1, number):
            figures = Figures(Ranks(rank, number, torch.device("cpu")))
            figures.step(seconds=0.3, waited_s=0.01, fusion_s=[0.01, 0.01])
            self._texts[str(rank)] = render(figures.registry.collect())

    def put(self, key: str, text: str) -> None:
        """Take nothing."""

    def get_many(self, keys: Sequence[str]) -> dict[str, str]:
        """Return the others' notes."""
        self._looks += 1
        return {key: note(self._looks, "host", self._texts[key]) for key in keys}


def _compare(
    train: Callable[[], None],
    watch: _Watch,
    setting: Setting,
    number: int,
    settle: Callable[[], None],
    say: Callable[[str], None],
) -> list[Verdict]:
    orders, theirs = multiprocessing.get_context("spawn").Pipe()
    client = multiprocessing.get_context("spawn").Process(
        target=_scrape, args=(theirs, f"http://{watch.endpoint.target}{PATH}", setting.rate), daemon=True
    )
    client.start()
    theirs.close()
    orders.recv()  # it is there
    counts: list[int] = []
    served_s: list[float] = []

    def scraped() -> None:
        before = _thread_s("metrics")
        orders.send("go")
        train()
        orders.send("halt")
        counts.append(orders.recv())
        served_s.append(_thread_s("metrics") - before)

    refreshes, refreshing_s = watch.exchange.count, _thread_s("telemetry")
    try:
        without, with_client = take_turns(
            [train, scraped], setting.repeats, settle, lambda text: say(f"{number} ranks, {text}")
        )
    finally:
        orders.close()
        client.join()
    a_scrape = [1e3 * (slow - fast) / count for fast, slow, count in zip(without, with_client, counts[1:], strict=True)]
    serving = [1e3 * seconds / count for seconds, count in zip(served_s[1:], counts[1:], strict=True)]
    refreshed = watch.exchange.count - refreshes
    of = f"{number} rank{'s' * (number > 1)}, {watch.num_bytes / 2**10:.0f} KiB"
    found = [
        Verdict(f"training time of a scrape, {of} ({sum(counts[1:])} scrapes)", tuple(a_scrape), _MOST_MS),
        Verdict(f"processor time of serving one, {of}", tuple(serving), _MOST_MS),
    ]
    if refreshed:
        spent = 1e3 * (_thread_s("telemetry") - refreshing_s) / refreshed
        found.append(Verdict(f"processor time of a refresh, {of} ({refreshed} of them)", (spent,)))
    return found


def _thread_s(name: str) -> float:
    """Return the processor time that a thread of this process has had."""
    thread = next(thread for thread in threading.enumerate() if thread.name == name)
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def _scrape(orders: Connection, url: str, rate: float) -> None:
    """Scrape at a rate from one order to the next, and answer with how often; end with the pipe."""
    orders.send("here")
    with contextlib.suppress(EOFError):
        while True:
            orders.recv()
            started, done = time.monotonic(), 0
            while not orders.poll(max(0.0, started + done / rate - time.monotonic())):
                with urllib.request.urlopen(url, timeout=_LONGEST_ANSWER_S) as answer:
                    answer.read()
                done += 1
            orders.recv()
            orders.send(done)
