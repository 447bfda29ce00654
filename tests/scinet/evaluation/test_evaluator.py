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
from scinet.data.views import Normalisation, Views
from scinet.distributed import Ranks
from scinet.evaluation.evaluator import PlainSplit
from scinet.model.network import Output
from tests.scinet.conftest import MakeShards


class _Forward:
    """A model whose every call is a collective, as under ZeRO 3."""

    def __call__(self, inputs: Tensor) -> Output:
        if dist.is_initialized():
            dist.barrier()
        rows = inputs.flatten(1)
        return Output(rows[:, :3], rows)


def _score(folder: Path, ranks: Ranks, *, from_features: bool) -> dict[str, Tensor]:
    card = data_card.read(folder, prepare="")
    number = card.split("train").num_samples
    rows = torch.arange(number * 4.0).view(number, 4) / 100
    truth = torch.arange(number * 3).view(number, 3).to(torch.int8) % 2
    features = Features(torch.empty(0), rows, truth, torch.arange(number), ()) if from_features else None
    views = Views(32, Normalisation((0.5,) * 3, (0.5,) * 3), smallest_crop=0.5)
    return dataclasses.asdict(PlainSplit(card, "train", views, features).score(_Forward(), ranks))


def _on_rank(rank: int, world_size: int, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out / 'store'}", rank=rank, world_size=world_size)
    ranks = Ranks(rank, world_size, torch.device("cpu"))
    for from_features in (True, False):
        save_file(_score(folder, ranks, from_features=from_features), str(out / f"{from_features}-{rank}.safetensors"))
    gc.collect()  # so that the group dies here and joins its threads, not while the interpreter shuts down
    dist.destroy_process_group()


@pytest.mark.multiprocess
@pytest.mark.parametrize("num_samples", [2, 65 * 3 - 2])
def test_scores_are_equal_when_three_ranks_share_a_split_unevenly(
    make_shards: MakeShards, tmp_path: Path, num_samples: int
) -> None:
    folder = make_shards(num_samples, shard_samples=50).directory
    mp.spawn(_on_rank, args=(3, folder, tmp_path), nprocs=3)
    for from_features in (True, False):
        alone = _score(folder, Ranks(0, 1, torch.device("cpu")), from_features=from_features)
        assert len(alone["truth"]) == num_samples
        for rank in range(3):
            shared = load_file(str(tmp_path / f"{from_features}-{rank}.safetensors"))
            assert all(torch.equal(shared[name], alone[name]) for name in alone)
