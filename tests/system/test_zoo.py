"""The zoo's methods and heads do not depend on ranks, accumulation or a break, what they remember included.

That a method's loss is a sum over parts of the batch is shown in milliseconds in ``tests/scinet/zoo``; here some go end
to end, and all of them nightly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from scinet import config, materials
from scinet.checkpoint.keeper import Keeper
from scinet.distributed import Ranks
from scinet.notes import Notes
from scinet.options import CheckpointOptions
from scinet.rundir import RunDirectory
from scinet.telemetry import MetricsLog, Silence
from scinet.trainer import Trainer
from scinet.zoo.catalogue import METHODS
from tests import ranks as forked

pytestmark = pytest.mark.multiprocess

STEPS_PER_EPOCH, MIDDLE = 5, 7
HEADS = {
    "regions": ("model.head=prompt_regions", "data.cached_regions=2"),
    "linear": ("model.head=linear",),
    "cam": ("model.head=cam", "model.boost_alpha=5", "data.cached_regions=2"),
    "ml_decoder": ("model.head=ml_decoder", "data.cached_regions=2", "model.decoder_groups=20"),
    "dualcoop": ("model.head=dualcoop", "data.cached_regions=2", "optimizer.head_learning_rate=1e-4"),
}
TABLES = {"em_apl": "targets", "role": "updates", "ll_cp": "corrected", "p_asl": "sum", "scpnet": "ring"}
OVERRIDES = (
    "data.cache_features=true",
    "data.cached_variants=2",
    "model.freeze_image=true",
    "model.image_size=64",
    "model.backbone=debug",
    "train.global_batch_size=16",
    "train.epochs=3",
    "train.precision=fp32",
    "train.log_every_steps=1",
    "loss.warmup_fraction=0.4",
    "zoo.large_loss.percent=1",
    "zoo.selective.ignored=1",
    "zoo.entropy.start=0.4",
)
ALONE, TWO_RANKS, ACCUMULATED = (1, 1), (2, 1), (1, 2)
# one with a table, one that looks at the whole global batch, one with a head of its own, SCINet with another head
END_TO_END = (
    (TWO_RANKS, "role"),
    (ACCUMULATED, "scpnet"),
    (TWO_RANKS, "dualcoop:dualcoop"),
    (TWO_RANKS, "scinet:regions"),
)
EVERY = (
    *(method.value for method in METHODS if method.value not in ("dualcoop", "full_labels")),
    *("scinet:regions", "bce:linear", "bce:regions", "bce:cam", "bce:ml_decoder", "bce:dualcoop", "dualcoop:dualcoop"),
    "vlpl:cam",
)
CASES = (
    *END_TO_END,
    *(
        pytest.param(way, method, marks=pytest.mark.nightly)
        for way in (TWO_RANKS, ACCUMULATED)
        for method in EVERY
        if (way, method) not in END_TO_END
    ),
)


@dataclass(frozen=True)
class Ended:
    """What a rank saw: rows, first gradients, tables after an epoch and at the end, and what a break changed."""

    rows: list[dict[str, Any]]
    gradients: dict[str, Tensor]
    tables: dict[str, Tensor]
    last_tables: dict[str, Tensor]
    differing: list[str]


def _parts(trainer: Trainer) -> dict[str, Tensor]:
    return {part.name: part.read().view(part.shape).clone() for part in trainer.state().parts}


def _train(ranks: Ranks, method: str, overrides: list[str], folder: Path) -> Ended:
    """Train for three epochs, whole and from a checkpoint of the middle."""
    name, _, head = method.partition(":")
    options = config.load(None, [*overrides, f"method={name}", *(HEADS[head] if head else ())])
    made = materials.gather(options, ranks, lambda *_: None)
    log = MetricsLog(None)
    trainer = Trainer(options, made, ranks, log, Silence())
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    keeper = Keeper(RunDirectory(folder), CheckpointOptions(), ranks, patience_s=60, notes=Notes(ranks))
    seen: dict[int, dict[str, Tensor]] = {}

    def look() -> None:
        if trainer.progress.step in (1, STEPS_PER_EPOCH):
            seen[trainer.progress.step] = _parts(trainer)
        if trainer.progress.step == MIDDLE:
            keeper.save(trainer)

    while not trainer.is_finished:
        trainer.train_epoch(look)
    keeper.wait()
    whole = _parts(trainer)
    again = Trainer(options, made, ranks, MetricsLog(None), Silence())
    assert keeper.load(again, lambda _: None)
    assert again.progress.step == MIDDLE
    while not again.is_finished:
        again.train_epoch()
    resumed = _parts(again)
    return Ended(
        log.rows,
        # AdamW's first moments of the first step are its gradients, element by element, times a constant
        {name: value for name, value in seen[1].items() if "/exp_avg/" in name},
        {name: value for name, value in seen[STEPS_PER_EPOCH].items() if name.startswith("zoo/")},
        {name: value for name, value in whole.items() if name.startswith("zoo/")},
        [name for name, value in whole.items() if not torch.equal(_bits(value), _bits(resumed[name]))],
    )


def _bits(value: Tensor) -> Tensor:
    """Return a tensor whose NaNs are equal to themselves."""
    return value.contiguous().view(-1).view(torch.uint8)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Callable[[tuple[int, int], str], Ended]:
    """``ended((ranks, accumulation steps), method)``: what rank 0 saw."""

    @functools.cache
    def train(way: tuple[int, int], method: str) -> Ended:
        size, accumulation = way
        own = [*OVERRIDES, f"data.path={scenes}", f"train.accumulation_steps={accumulation}"]
        found: Ended = forked.run(_train, method, own, tmp_path_factory.mktemp("zoo"), size=size)[0]
        return found

    return train


@pytest.mark.parametrize(("way", "method"), CASES)
def test_method_is_equal_when_the_global_batch_is_cut(ended: Any, way: tuple[int, int], method: str) -> None:
    want, got = ended(ALONE, method), ended(way, method)
    norms = {name: float(torch.linalg.vector_norm(value)) for name, value in want.gradients.items()}
    for name, value in want.gradients.items():
        difference = float(torch.linalg.vector_norm(got.gradients[name] - value))
        # a gradient that is nearly nothing is the rounding of larger ones
        assert difference <= 1e-5 * (norms[name] + 0.01 * max(norms.values())), name
    # later the optimiser amplifies rounding; within an epoch a method's own part in it stays small
    losses = [[row["loss/total"] for row in rows[:STEPS_PER_EPOCH]] for rows in (got.rows, want.rows)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for name, value in want.tables.items():
        assert_close(got.tables[name], value, rtol=1e-3, atol=1e-3, equal_nan=True, msg=name)


@pytest.mark.parametrize(("way", "method"), CASES)
def test_method_goes_on_bit_for_bit_when_it_was_broken_off(ended: Any, way: tuple[int, int], method: str) -> None:
    assert ended(way, method).differing == []


@pytest.mark.parametrize(
    "method", ["role", *(pytest.param(name, marks=pytest.mark.nightly) for name in TABLES if name != "role")]
)
def test_memory_is_used(ended: Any, method: str) -> None:
    assert ended(ALONE, method).last_tables[f"zoo/{TABLES[method]}"].nan_to_num().bool().any()
