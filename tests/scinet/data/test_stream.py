"""The global order is a function of (seed, epoch) alone; damage is named, never passed over."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from scinet.data.card import DataCard
from scinet.data.stream import Order, SampleStream, StoredSample, check_skipped, read_evenly
from scinet.errors import DataError
from tests.scinet.conftest import MakeShards

ORDER = Order(seed=3, epoch=1, lanes=4, shuffle_window=5)


@pytest.fixture(scope="module")
def shards(make_shards: MakeShards) -> DataCard:
    return make_shards(53, shard_samples=9)


def _ids(card: DataCard, order: Order, rank: int = 0, world_size: int = 1) -> list[str]:
    return [sample.sample_id for sample in SampleStream(card, "train", order, rank=rank, world_size=world_size)]


def _sample_id(sample: StoredSample) -> str:
    return sample.sample_id


def _interleaved(parts: list[list[str]]) -> list[str]:
    total = sum(map(len, parts))
    return [parts[position % len(parts)][position // len(parts)] for position in range(total)]


def test_every_sample_comes_exactly_once_when_the_pass_is_whole(shards: DataCard) -> None:
    assert sorted(_ids(shards, ORDER)) == [f"train-{n:04d}" for n in range(53)]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_global_order_is_equal_when_ranks_and_workers_share_it(shards: DataCard, world_size: int, workers: int) -> None:
    parts = []
    for rank in range(world_size):
        part = SampleStream(shards, "train", ORDER, rank=rank, world_size=world_size, transform=_sample_id)
        parts.append(list(DataLoader(part, batch_size=None, num_workers=workers)))
    assert _interleaved(parts) == _ids(shards, ORDER)


@pytest.mark.parametrize("world_size", [1, 2, 5, 60])
def test_ranks_read_equally_many_samples_when_they_do_not_divide_the_split(shards: DataCard, world_size: int) -> None:
    parts = [list(read_evenly(shards, "train", rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert {len(part) for part in parts} == {-(-53 // world_size)}
    together = [sample for row in zip(*parts, strict=True) for sample in row]
    assert [sample.sample_id for sample in together[:53]] == [f"train-{n:04d}" for n in range(53)]
    assert all(sample is None for sample in together[53:])


def test_epochs_and_seeds_give_other_orders_when_shuffled(shards: DataCard) -> None:
    orders = [dataclasses.replace(ORDER, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(_ids(shards, order)) for order in orders}) == 4
    assert _ids(shards, orders[0]) == _ids(shards, orders[0])


def test_written_order_is_kept_when_nothing_is_shuffled(shards: DataCard) -> None:
    assert _ids(shards, Order(3, 1, lanes=1, shuffle_window=0)) == [f"train-{n:04d}" for n in range(53)]


def test_lanes_take_turns_in_written_order_when_nothing_is_shuffled(shards: DataCard) -> None:
    # 53 samples in 4 lanes: ranges of 14, 13, 13, 13
    starts, ids = (0, 14, 27, 40), _ids(shards, Order(3, 1, lanes=4, shuffle_window=0))
    assert ids[:9] == [f"train-{starts[p % 4] + p // 4:04d}" for p in range(9)]
    assert ids[-1] == "train-0013"


@pytest.mark.parametrize("length", [1, 4, 50, 53, 60])
def test_pass_is_a_prefix_when_cut_off(shards: DataCard, length: int) -> None:
    assert _ids(shards, dataclasses.replace(ORDER, length=length)) == _ids(shards, ORDER)[:length]


def test_every_sample_comes_once_when_there_are_more_lanes_than_samples(make_shards: MakeShards) -> None:
    card = make_shards(5, shard_samples=2)
    order = Order(0, 0, lanes=16, shuffle_window=3)
    whole = _ids(card, order)
    assert len(set(whole)) == 5
    assert _interleaved([_ids(card, order, rank=rank, world_size=8) for rank in range(8)]) == whole


def test_sample_says_where_it_lies_when_read(shards: DataCard) -> None:
    sample = next(iter(SampleStream(shards, "train", Order(0, 0, 1, 0))))
    assert str(shards.shard_paths("train")[0]) in sample.where
    assert "train-0000" in sample.where


def _rewrite(make_shards: MakeShards, change: Callable[[dict[str, bytes]], object]) -> DataCard:
    """Return a card whose one shard had its members changed."""
    card = make_shards(4, shard_samples=4)
    path = card.shard_paths("train")[0]
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    change(members)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return card


def _relabel(labels: Any) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.update({"train-0002.json": json.dumps(labels).encode()})


def _refusal(card: DataCard) -> str:
    with pytest.raises(DataError) as caught:
        _ids(card, Order(0, 0, 1, 0))
    assert str(card.shard_paths("train")[0]) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("member", ["train-0002.json", "train-0002.png"])
def test_sample_is_named_when_a_part_of_it_is_missing(make_shards: MakeShards, member: str) -> None:
    message = _refusal(_rewrite(make_shards, lambda members: members.pop(member)))
    assert "'train-0002'" in message
    assert "expected json and one of jpg, png, webp" in message


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"id": "a", "index": 0, "positives": [3], "negatives": []}, "class 3 of 3"),
        ({"id": "a", "index": 0, "positives": [], "negatives": [99]}, "class 99 of 3"),
        ({"id": "a", "index": 0, "positives": [-1], "negatives": []}, "class -1 of 3"),
        ({"id": "a", "index": 0, "positives": [1, 2], "negatives": [0, 2]}, "class 2 is positive and negative at once"),
        ({"id": "a", "index": 0, "positives": ["cat"], "negatives": []}, "'positives' is no list of whole numbers"),
        ({"id": "a", "index": 0, "positives": None, "negatives": []}, "'positives' is no list of whole numbers"),
        ({"id": "a", "index": 0, "positives": [True], "negatives": []}, "'positives' is no list of whole numbers"),
        ({"id": "a", "positives": [], "negatives": []}, "no 'index'"),
        ({"id": "a", "index": "x", "positives": [], "negatives": []}, "'index' is no whole number"),
        ({"id": "a", "index": 1.5, "positives": [], "negatives": []}, "'index' is no whole number"),
        ({"id": "a", "index": 4, "positives": [], "negatives": []}, "index 4 of 4"),
        ({"id": "a", "index": -1, "positives": [], "negatives": []}, "index -1 of 4"),
        ({"index": 0, "positives": [], "negatives": []}, "no 'id'"),
        ([], "a list, expected an object"),
    ],
)
def test_sample_is_named_when_its_labels_do_not_fit(make_shards: MakeShards, labels: Any, reason: str) -> None:
    message = _refusal(_rewrite(make_shards, _relabel(labels)))
    assert "'train-0002'" in message
    assert message.endswith(f"its labels are not usable: {reason}")


def test_sample_is_named_when_its_json_is_none(make_shards: MakeShards) -> None:
    card = _rewrite(make_shards, lambda members: members.update({"train-0002.json": b"\xff{"}))
    assert "'train-0002'" in _refusal(card)


def test_shard_is_named_when_it_holds_fewer_samples_than_the_card_says(make_shards: MakeShards) -> None:
    def drop(members: dict[str, bytes]) -> None:
        del members["train-0003.json"], members["train-0003.jpg"]

    assert "ends after 3 samples, the data card says 4" in _refusal(_rewrite(make_shards, drop))


def test_shard_is_named_when_it_is_gone(make_shards: MakeShards) -> None:
    card = make_shards(4)
    card.shard_paths("train")[0].unlink()
    _refusal(card)


@settings(deadline=None, max_examples=25)
@given(share=st.floats(0, 1))
def test_shard_is_named_when_it_is_truncated_anywhere(make_shards: MakeShards, share: float) -> None:
    card = make_shards(6, shard_samples=6)
    path = card.shard_paths("train")[0]
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + last.size
    path.write_bytes(content[: int(share * (end - 1))])
    _refusal(card)


def test_shard_is_named_when_the_second_of_three_is_truncated(make_shards: MakeShards) -> None:
    card = _second_truncated(make_shards)
    seen: list[StoredSample] = []
    with pytest.raises(DataError) as caught:
        seen.extend(SampleStream(card, "train", Order(0, 0, 1, 0)))
    assert str(card.shard_paths("train")[1]) in str(caught.value)
    assert 4 <= len(seen) < 8


def test_error_is_the_last_item_when_a_loader_process_meets_it(make_shards: MakeShards) -> None:
    card = _second_truncated(make_shards)
    stream = SampleStream(card, "train", Order(0, 0, 1, 0))
    *seen, error = list(DataLoader(stream, batch_size=None, num_workers=1))
    assert isinstance(error, DataError)
    assert "\n" not in str(error)
    assert str(card.shard_paths("train")[1]) in str(error)
    assert 4 <= len(seen) < 8


def _second_truncated(make_shards: MakeShards) -> DataCard:
    card = make_shards(12, shard_samples=4)
    path = card.shard_paths("train")[1]
    path.write_bytes(path.read_bytes()[:3000])
    return card


def test_transform_is_applied_when_given(shards: DataCard) -> None:
    lengths = SampleStream(shards, "train", ORDER, transform=lambda sample: len(sample.image))
    assert all(isinstance(length, int) and length > 0 for length in lengths)


@pytest.mark.parametrize(
    ("skipped", "read", "fraction", "is_too_many"),
    [
        (0, 0, 0.0, False),
        (1, 1, 0.0, False),  # one among the first hundred is forgiven
        (1, 100, 0.001, False),
        (1, 101, 0.001, True),
        (1, 1000, 0.001, False),  # as many as allowed
        (2, 100, 0.02, False),
        (2, 99, 0.02, True),
        (2, 100, 0.0, True),
        (9, 10, 1.0, False),
    ],
)
def test_bad_samples_are_too_many_beyond_their_share(
    skipped: int, read: int, fraction: float, is_too_many: bool
) -> None:
    expected = pytest.raises(DataError, match=f"{skipped} of {read} samples") if is_too_many else nullcontext()
    with expected:
        check_skipped(skipped, read, fraction)
