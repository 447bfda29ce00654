"""Order, coverage and resumption hold for any shards, lanes, window, ranks, workers and batch size."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import get_worker_info

from scinet.data import sources, stream, tars
from scinet.data.card import DataCard, Shard, Split
from scinet.data.masks import derive
from scinet.data.order import Order, lane_parts, lane_places
from scinet.data.stream import SampleStream

_read: list[str] = []  # shards opened since it was cleared


@contextlib.contextmanager
def _named(card: DataCard, shard: Shard, options: Any) -> Iterator[Any]:
    del card, options
    _read.append(shard.file)
    yield mock.Mock(shard=shard.file)


def _numbered(source: Any, url: str, numbers: Sequence[int], *, largest_member: int) -> Iterator[dict[str, Any]]:
    """Stand in for the reading of a tar: samples named by shard and place."""
    del largest_member
    for number in numbers:
        labels = {"id": f"{source.shard}/{number}", "index": number, "positives": [], "negatives": []}
        yield {"__url__": url, "__key__": str(number), "png": b"", "json": json.dumps(labels).encode()}


@pytest.fixture(autouse=True, scope="module")
def _without_files() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "opened", _named)
        patch.setattr(tars, "samples", _numbered)
        yield


def _card(sizes: Sequence[int]) -> DataCard:
    shards = tuple(Shard(f"{n}.tar", size, 0, "") for n, size in enumerate(sizes))
    return DataCard("any", ("a",), {"train": Split(sum(sizes), (0,), (0,), shards)}, {}, Path(), "", sum(sizes))


def _ids(card: DataCard, order: Order, rank: int = 0, world_size: int = 1, workers: int = 1) -> list[str]:
    """Return the samples of a rank as a loader with that many workers gives them: by turns."""
    parts = []
    for number in range(workers):
        info = mock.Mock(num_workers=workers, id=number) if workers > 1 else None
        with mock.patch.object(stream, get_worker_info.__name__, return_value=info):
            reader = SampleStream(card, "train", order, rank=rank, world_size=world_size)
            parts.append([sample.sample_id for sample in reader])
    return _interleaved(parts)


def _interleaved(parts: list[list[str]]) -> list[str]:
    total = sum(map(len, parts))
    return [parts[position % len(parts)][position // len(parts)] for position in range(total)]


_SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), sizes=_SIZES)
def test_global_order_is_equal_whoever_reads_it_and_wherever_it_begins(data: st.DataObject, sizes: list[int]) -> None:
    card, total = _card(sizes), sum(sizes)
    order = Order(
        seed=data.draw(st.integers(0, 9)),
        epoch=data.draw(st.integers(0, 9)),
        lanes=data.draw(st.integers(1, 12)),
        shuffle_window=data.draw(st.integers(0, 12)),
        length=data.draw(st.integers(0, total + 3)),
    )
    world_size, workers = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    micro_batch = data.draw(st.integers(1, 4))
    whole, uncut = _ids(card, order), _ids(card, dataclasses.replace(order, length=0))
    assert len(whole) == len(set(whole)) == min(order.length or total, total)
    assert set(uncut) == {f"{n}.tar/{k}" for n, size in enumerate(sizes) for k in range(size)}
    assert whole == uncut[: len(whole)]
    start = data.draw(st.integers(0, 1 + len(whole) // (world_size * micro_batch))) * world_size * micro_batch
    resumed = dataclasses.replace(order, start=start)
    parts = [_ids(card, resumed, rank, world_size, workers) for rank in range(world_size)]
    assert _interleaved(parts) == whole[start:]


@settings(deadline=None, max_examples=50)
@given(count=st.integers(0, 300), window=st.integers(1, 40), lane=st.integers(0, 3))
def test_places_are_those_of_a_window_that_draws_one_by_one(count: int, window: int, lane: int) -> None:
    generator = np.random.Generator(np.random.PCG64(derive(5, "lane", 2, lane)))
    held: list[int] = []
    expected = []
    for place in range(count):
        held.append(place)
        if len(held) > window:
            chosen = int(generator.integers(len(held)))
            held[chosen], held[-1] = held[-1], held[chosen]
            expected.append(held.pop())
    while held:
        chosen = int(generator.integers(len(held)))
        held[chosen], held[-1] = held[-1], held[chosen]
        expected.append(held.pop())
    assert list(lane_places(count, Order(5, 2, 4, window), lane)) == expected


@settings(deadline=None, max_examples=50)
@given(sizes=_SIZES, lanes=st.integers(1, 20), window=st.integers(0, 3))
def test_lanes_take_every_sample_once(sizes: list[int], lanes: int, window: int) -> None:
    order = Order(1, 2, lanes, window)
    parts = [lane_parts(sizes, order, lane) for lane in range(lanes)]
    taken = [(part.shard, number) for lane in parts for part in lane for number in range(part.start, part.stop)]
    assert sorted(taken) == [(shard, number) for shard, size in enumerate(sizes) for number in range(size)]
    lengths = [sum(part.stop - part.start for part in lane) for lane in parts]
    assert max(lengths) - min(lengths) <= 1
    for lane in parts:
        assert [part.first for part in lane] == [
            sum(other.stop - other.start for other in lane[:number]) for number in range(len(lane))
        ]


def test_order_is_the_one_that_earlier_runs_had() -> None:
    # written down from the first release: a change here changes every result
    ids = _ids(_card([5, 4, 6]), Order(seed=3, epoch=1, lanes=2, shuffle_window=4))
    assert " ".join(name.replace(".tar/", ":") for name in ids) == (
        "0:4 2:2 1:0 1:3 0:0 2:4 0:3 2:5 1:2 2:1 1:1 2:0 0:1 2:3 0:2"
    )


def test_shards_come_in_another_order_in_every_epoch_and_seed_unless_nothing_is_shuffled() -> None:
    def shards(seed: int, epoch: int, window: int = 4) -> list[int]:
        return [part.shard for part in lane_parts([3] * 8, Order(seed, epoch, 1, window), 0)]

    orders = [shards(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len({tuple(order) for order in (*orders, list(range(8)))}) == 5
    assert shards(1, 1, window=0) == list(range(8))
    # written down from the first release, as the order of samples
    assert shards(3, 1) == [3, 1, 4, 5, 0, 6, 2, 7]


def test_shards_before_the_windows_are_not_opened_when_a_pass_begins_late() -> None:
    card = _card([10] * 40)
    order = Order(0, 0, lanes=2, shuffle_window=5)
    _read.clear()
    whole = _ids(card, order)
    assert len(_read) == 40
    _read.clear()
    assert _ids(card, dataclasses.replace(order, start=360)) == whole[360:]
    assert len(_read) < 20
