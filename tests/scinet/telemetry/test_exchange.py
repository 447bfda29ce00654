"""Figures travel by notes alone: what rank 0 tells of ranks that speak, fall silent, or were never heard."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from scinet.distributed import Ranks
from scinet.telemetry import exchange as exchange_module
from scinet.telemetry.exchange import Exchange, note
from scinet.telemetry.figures import Figures

CPU = torch.device("cpu")


class Board:
    """Notes of ranks that are all in this process."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def put(self, key: str, text: str) -> None:
        self.texts[key] = text

    def get_many(self, keys: Sequence[str]) -> dict[str, str]:
        return {key: self.texts[key] for key in keys if key in self.texts}


class Clock:
    """Rank 0's clock, set by hand."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return 1000.0 + self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(exchange_module, "time", clock)
    return clock


def _exchange(rank: int, board: Any, published: list[str], *, shares: bool = True, world_size: int = 3) -> Exchange:
    ranks = Ranks(rank, world_size, CPU)
    figures = Figures(ranks)
    figures.step(seconds=rank + 1.0, waited_s=0.1, fusion_s=[])
    return Exchange(figures.registry, ranks, board, published.append, refresh_s=2.0, shares=shares)


def _values(text: str, name: str) -> dict[str, float]:
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.labels["rank"]: sample.value for sample in samples if sample.name == name}


def test_rank_counts_as_up_until_it_has_said_nothing_for_long(clock: Clock) -> None:
    board, published = Board(), list[str]()
    first, second = _exchange(0, board, published), _exchange(1, board, [])
    second.refresh()
    first.refresh()
    assert _values(published[-1], "scinet_rank_up") == {"0": 1, "1": 1, "2": 1}, "rank 2 may yet come"
    assert _values(published[-1], "scinet_step_duration_seconds_sum") == {"0": 1, "1": 2}
    clock.now_s = 10
    second.refresh()
    first.refresh()
    clock.now_s = 12  # later than 3 refreshes and a grace of 5 s after the start
    first.refresh()
    assert _values(published[-1], "scinet_rank_up") == {"0": 1, "1": 1, "2": 0}
    assert _values(published[-1], "scinet_rank_heartbeat_timestamp_seconds") == {"0": 1012, "1": 1010, "2": 1000}
    clock.now_s = 21.5
    first.refresh()
    assert _values(published[-1], "scinet_rank_up") == {"0": 1, "1": 0, "2": 0}
    assert _values(published[-1], "scinet_step_duration_seconds_sum") == {"0": 1, "1": 2}, "its last figures stay"
    second.refresh()
    first.refresh()
    assert _values(published[-1], "scinet_rank_up")["1"] == 1, "it speaks again"


def test_host_of_a_rank_is_told(clock: Clock) -> None:
    board, published = Board(), list[str]()
    board.put("1", note(1, 'host "b"', ""))
    _exchange(0, board, published, world_size=2).refresh()
    families = {family.name: family for family in text_string_to_metric_families(published[-1])}
    hosts = {sample.labels["rank"]: sample.labels["host"] for sample in families["scinet_rank_up"].samples}
    assert hosts["1"] == 'host "b"'


def test_ranks_keep_their_figures_to_themselves_when_each_serves_its_own(clock: Clock) -> None:
    board, published, own = Board(), list[str](), list[str]()
    second = _exchange(1, board, own, shares=False)
    second.refresh()
    _exchange(0, board, published, shares=False).refresh()
    assert _values(published[-1], "scinet_step_duration_seconds_sum") == {"0": 1}
    assert _values(published[-1], "scinet_rank_up") == {"0": 1, "1": 1, "2": 1}
    assert _values(own[-1], "scinet_step_duration_seconds_sum") == {"1": 2}
    assert _values(own[-1], "scinet_rank_up") == {}


def test_training_goes_on_with_one_warning_when_the_exchange_breaks(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Board):
        def get_many(self, keys: Sequence[str]) -> dict[str, str]:
            raise KeyError("a mistake of ours")

    published: list[str] = []
    exchange = Exchange(
        Figures(Ranks(0, 2, CPU)).registry,
        Ranks(0, 2, CPU),
        Broken(),
        published.append,
        refresh_s=0.01,
        shares=True,
    )
    exchange.start()
    time.sleep(0.1)
    exchange.close()
    assert len(caplog.records) == 1
    assert _values(published[-1], "scinet_rank_steps_total") == {"0": 0}
