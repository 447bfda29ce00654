"""A training that takes milliseconds: towers of a few weights, features that are there already, one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scinet import config
from scinet.data.batch import Features
from scinet.data.card import DataCard, Split
from scinet.data.views import Views
from scinet.distributed import Ranks
from scinet.materials import Materials
from scinet.options import Options
from scinet.telemetry import MetricsLog, Silence
from scinet.trainer import State, Trainer
from tests.scinet.model.conftest import FEATURES, small_backbone

CLASSES = ("cat", "dog", "owl", "fox", "newt")
NUM_TRAIN, NUM_HOLDOUT, BATCH = 29, 12, 6
SMALL = (
    "model.freeze_image=true",
    "data.cache_features=true",
    "data.known_ratio=0.5",
    "fusion.bank_size=16",
    "correlation.graph_top_k=3",
    "loss.hard_k=2",
    "loss.threshold_window=8",
    # a few steps have to move every weight
    "optimizer.learning_rate=0.01",
    "optimizer.graph_learning_rate=0.01",
    "optimizer.head_learning_rate=0.01",
    f"train.global_batch_size={BATCH}",
    "train.epochs=3",
    "train.log_every_steps=3",
)
CLOCKS = {"samples_per_second", "data_wait_share"}


def materials(options: Options, *, missing: tuple[int, ...] = ()) -> Materials:
    """Towers and features of two splits; the training samples of ``missing`` could not be read."""
    backbone = small_backbone(seed=1)
    generator = torch.Generator().manual_seed(2)
    features = {}
    for split, size in (("train", NUM_TRAIN), ("holdout", NUM_HOLDOUT)):
        truth = torch.where(torch.rand(size, len(CLASSES), generator=generator) < 0.4, 1, -1).to(torch.int8)
        truth[:, :2] *= (torch.rand(size, 2, generator=generator) < 0.9).to(torch.int8)
        index, ids = torch.arange(size), [f"{split}-{number}" for number in range(size)]
        for number in missing if split == "train" else ():
            index[number], ids[number], truth[number] = -1, "", 0
        random = torch.randn(size, 2, 3, FEATURES, generator=generator).half()
        features[split] = Features(random, random[:, 0, 0].float(), truth, index, tuple(ids))
    splits = {
        name: Split(
            len(found.truth), tuple((found.truth > 0).sum(0).tolist()), tuple((found.truth < 0).sum(0).tolist()), ()
        )
        for name, found in features.items()
    }
    card = DataCard("small", CLASSES, splits, {}, Path(), "", NUM_TRAIN)
    return Materials(card, backbone, Views(32, backbone.normalisation, smallest_crop=0.5), options.data, features)


def begin(
    ranks: Ranks, *overrides: str, kind: type[Trainer] = Trainer, missing: tuple[int, ...] = (), **more: Any
) -> tuple[Trainer, MetricsLog]:
    """Return a trainer before its first step, and the rows it will write."""
    options = config.load(None, [*SMALL, *overrides])
    log = MetricsLog(None)
    return kind(options, materials(options, missing=missing), ranks, log, Silence(), **more), log


class Enough(Exception):
    """Ends a training between two steps, as a kill does."""


def train_to(trainer: Trainer, step: int, look: Callable[[], None] = lambda: None) -> None:
    """Train until a step is done, over as many epochs as that takes; ``look`` is called after each step."""

    def after_step() -> None:
        look()
        if trainer.progress.step >= step:
            raise Enough

    while trainer.progress.step < step:
        try:
            trainer.train_epoch(after_step)
        except Enough:
            return


def taken(state: State) -> tuple[dict[str, Tensor], str]:
    """Return what a checkpoint keeps of a state: copies of its tensors, and the rest as JSON."""
    return {part.name: part.read().clone() for part in state.parts}, json.dumps(state.scalars)


def go_back(trainer: Trainer, tensors: dict[str, Tensor], scalars: str) -> None:
    """Give a trainer a state as a checkpoint does."""
    state = trainer.state()
    assert {part.name for part in state.parts} == tensors.keys()
    for part in state.parts:
        part.write(tensors[part.name])
    state.settle(json.loads(scalars))


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows without what a clock has measured."""
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Return the names whose values are not bit-equal."""
    return [name for name, value in before.items() if not torch.equal(_bits(value), _bits(after[name]))]


def _bits(value: Tensor) -> Tensor:
    """The memory of samples that were never seen holds NaN, which is equal to nothing."""
    return value.detach().reshape(-1).view(torch.uint8)
