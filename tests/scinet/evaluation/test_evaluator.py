"""A split's scores hold each sample once and in order, also where there are more ranks than samples."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from scinet.data import card as data_card
from scinet.data.batch import Features
from scinet.data.card import DataCard
from scinet.data.views import Normalisation, Views
from scinet.distributed import Ranks
from scinet.errors import DataError, Preempted
from scinet.evaluation import evaluator
from scinet.evaluation.evaluator import PlainSplit
from scinet.guard import Guard
from scinet.model.network import Output
from scinet.options import DataOptions, OnBadSample
from tests.scinet.conftest import MakeShards, spoil


class _Forward:
    """A model whose every call is a collective, as under ZeRO 3."""

    def __call__(self, inputs: Tensor) -> Output:
        if dist.is_initialized():
            dist.barrier()
        rows = inputs.flatten(1)
        return Output(rows[:, :3], rows)


SKIP = DataOptions(on_bad_sample=OnBadSample.skip)
NUM_SAMPLES = (2, 5, 65 * 3 - 2)


def _score(folder: Path, ranks: Ranks, *, from_features: bool, options: DataOptions | None = None) -> dict[str, Tensor]:
    card = data_card.read(folder, prepare="")
    number = card.split("train").num_samples
    rows = torch.arange(number * 4.0).view(number, 4) / 100
    truth = torch.arange(number * 3).view(number, 3).to(torch.int8) % 2
    features = Features(torch.empty(0), rows, truth, torch.arange(number), ()) if from_features else None
    views = Views(32, Normalisation((0.5,) * 3, (0.5,) * 3), smallest_crop=0.5)
    return dataclasses.asdict(PlainSplit(card, "train", views, features, options=options).score(_Forward(), ranks))


def _on_rank(rank: int, world_size: int, folders: list[Path], out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out / 'store'}", rank=rank, world_size=world_size)
    ranks = Ranks(rank, world_size, torch.device("cpu"))
    for number, folder in enumerate(folders):
        for from_features in (True, False):
            scores = _score(folder, ranks, from_features=from_features, options=SKIP)
            save_file(scores, str(out / f"{number}-{from_features}-{rank}.safetensors"))
    gc.collect()  # so that the group dies here and joins its threads, not while the interpreter shuts down
    dist.destroy_process_group()


@pytest.mark.multiprocess
@pytest.mark.parametrize("world_size", [2, 3])
def test_scores_are_equal_when_ranks_share_a_split_unevenly(
    make_shards: MakeShards, spoilt: DataCard, tmp_path: Path, world_size: int
) -> None:
    folders = [make_shards(number, shard_samples=50).directory for number in NUM_SAMPLES] + [spoilt.directory]
    mp.spawn(_on_rank, args=(world_size, folders, tmp_path), nprocs=world_size)
    for number, folder in enumerate(folders):
        for from_features in (True, False):
            alone = _score(folder, Ranks(0, 1, torch.device("cpu")), from_features=from_features, options=SKIP)
            if folder != spoilt.directory:
                assert len(alone["truth"]) == NUM_SAMPLES[number]
            for rank in range(world_size):
                shared = load_file(str(tmp_path / f"{number}-{from_features}-{rank}.safetensors"))
                assert all(torch.equal(shared[name], alone[name]) for name in alone)


@pytest.fixture
def spoilt(make_shards: MakeShards) -> DataCard:
    return spoil(make_shards(7, shard_samples=3), "train-0004")


def test_skipped_sample_is_in_no_figure_when_it_cannot_be_decoded(make_shards: MakeShards, spoilt: DataCard) -> None:
    one = Ranks(0, 1, torch.device("cpu"))
    whole = _score(make_shards(7, shard_samples=3).directory, one, from_features=False)
    rest = _score(spoilt.directory, one, from_features=False, options=SKIP)
    kept = [0, 1, 2, 3, 5, 6]
    assert torch.equal(rest["truth"], whole["truth"][kept])
    assert torch.equal(rest["probabilities"], whole["probabilities"][kept])
    with pytest.raises(DataError, match="'train-0004'"):
        _score(spoilt.directory, one, from_features=False)


def test_evaluation_stops_when_too_many_samples_are_bad(make_shards: MakeShards) -> None:
    card = spoil(make_shards(7, shard_samples=3), "train-0002", "train-0004")
    with pytest.raises(DataError, match=r"2 of 7 samples could not be read.*max_bad_fraction=0\.01"):
        _score(card.directory, Ranks(0, 1, torch.device("cpu")), from_features=False, options=SKIP)


# ranks that take turns in this process


def _plain(card: DataCard, features: Features | None, options: DataOptions) -> PlainSplit:
    views = Views(32, Normalisation((0.5,) * 3, (0.5,) * 3), smallest_crop=0.5)
    return PlainSplit(card, "train", views, features, options=options)


def _features(num_samples: int, *missing: int) -> Features:
    generator = torch.Generator().manual_seed(num_samples)
    index = torch.arange(num_samples)
    index[list(missing)] = -1
    truth = torch.randint(-1, 2, (num_samples, 3), generator=generator).to(torch.int8)
    plain = torch.randn(num_samples, 4, generator=generator)
    return Features(torch.empty(0), plain, truth, index, tuple(map(str, range(num_samples))))


class _Marks(Guard):
    def __init__(self, stop_at: int = 0) -> None:
        self.doing: list[str] = []
        self._stop_at = stop_at

    def boundary(self, doing: str) -> None:
        self.doing.append(doing)
        if len(self.doing) == self._stop_at:
            raise Preempted("stopped")


def _without_gradient(inputs: Tensor) -> Output:
    assert not torch.is_grad_enabled()
    return _Forward()(inputs)


def _sent(monkeypatch: pytest.MonkeyPatch, split: PlainSplit, rank: int, world_size: int) -> tuple[list[Tensor], int]:
    """Return the columns that a rank gives to the others, and how often it ran the model."""
    columns: list[Tensor] = []
    marks = _Marks()

    def gather_rows(rows: Tensor, _ranks: Ranks) -> Tensor:
        columns.append(rows)
        return rows

    monkeypatch.setattr(evaluator, "gather_rows", gather_rows)
    monkeypatch.setattr(evaluator, "check_skipped", lambda *_: None)
    split.score(_without_gradient, Ranks(rank, world_size, torch.device("cpu")), marks)
    assert set(marks.doing) == {"evaluating on 'train'"}
    return columns, len(marks.doing)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("num_samples", "missing"), [(2, ()), (7, (0, 4)), (65 * 3 - 2, (193 - 1,))])
def test_rows_of_all_ranks_are_the_split_once_and_in_order(
    monkeypatch: pytest.MonkeyPatch,
    make_shards: MakeShards,
    world_size: int,
    num_samples: int,
    missing: tuple[int, ...],
) -> None:
    features = _features(num_samples, *missing)
    card = make_shards(2)
    card = dataclasses.replace(
        card, splits={"train": dataclasses.replace(card.split("train"), num_samples=num_samples)}
    )
    split = _plain(card, features, SKIP)
    sent, batches = zip(*(_sent(monkeypatch, split, rank, world_size) for rank in range(world_size)), strict=True)
    assert len(set(batches)) == 1, "every call of the model is a collective"
    columns = (torch.stack(rows, dim=1).flatten(0, 1) for rows in zip(*sent, strict=True))
    probabilities, truth, _observed, _indices, is_sample = columns
    kept = [number for number in range(num_samples) if number not in missing]
    assert torch.equal(truth[is_sample], features.truth[kept])
    torch.testing.assert_close(probabilities[is_sample], torch.sigmoid(features.plain[kept, :3]))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_images_of_all_ranks_are_the_split_once_and_in_order(
    monkeypatch: pytest.MonkeyPatch, spoilt: DataCard, world_size: int
) -> None:
    alone = _plain(spoilt, None, SKIP).score(_without_gradient, Ranks(0, 1, torch.device("cpu")))
    sent, batches = zip(
        *(_sent(monkeypatch, _plain(spoilt, None, SKIP), rank, world_size) for rank in range(world_size)), strict=True
    )
    assert set(batches) == {1}
    columns = (torch.stack(rows, dim=1).flatten(0, 1) for rows in zip(*sent, strict=True))
    probabilities, truth, _observed, _indices, is_sample = columns
    assert torch.equal(probabilities[is_sample], alone.probabilities)
    assert torch.equal(truth[is_sample], alone.truth)
    assert len(alone.truth) == 6


def test_evaluation_stops_between_two_batches_when_asked_to(make_shards: MakeShards) -> None:
    features = _features(150)
    card = make_shards(2)
    card = dataclasses.replace(card, splits={"train": dataclasses.replace(card.split("train"), num_samples=150)})
    with pytest.raises(Preempted):
        _plain(card, features, SKIP).score(_without_gradient, Ranks(0, 1, torch.device("cpu")), _Marks(stop_at=2))
