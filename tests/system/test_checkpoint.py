"""A checkpoint goes on bit-equal at its layout, and equal to rounding at any other number of ranks and ZeRO stage."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scinet import config, materials
from scinet.checkpoint.keeper import Keeper
from scinet.distributed import Ranks
from scinet.materials import Materials
from scinet.notes import Notes
from scinet.options import CheckpointOptions
from scinet.rundir import RunDirectory
from scinet.telemetry import MetricsLog, Silence
from scinet.trainer import Trainer
from tests import ranks as forked

pytestmark = pytest.mark.multiprocess

Ended = tuple[dict[str, Tensor], list[dict[str, Any]]]
# checkpoints of two ranks, and the ranks and layouts that go on from them
SAME = ("fp32-3", "bf16-0", *(pytest.param(x, marks=pytest.mark.nightly) for x in ("fp32-0", "fp32-2", "bf16-3")))
OTHER = (
    ("fp32-0", 2, "fp32-2-offload"),
    ("bf16-0", 2, "bf16-3"),
    ("fp32-3", 1, "fp32-0"),
    ("fp32-2", 3, "fp32-3"),
    *(
        pytest.param(*case, marks=pytest.mark.nightly)
        for case in (
            ("fp32-2", 2, "fp32-0"),
            ("fp32-0", 2, "fp32-3"),
            ("fp32-2", 2, "fp32-3-offload"),
            ("fp32-2", 1, "fp32-1"),
            ("fp32-0", 1, "fp32-3"),
            ("fp32-0", 3, "fp32-2"),
            ("fp32-3", 3, "fp32-1"),
        )
    ),
)
CLOCKS = {"samples_per_second", "data_wait_share"}
MIDDLE, END = 4, 8
FIGURES = ("loss/total", "loss/supervised", "loss/distillation", "gradient_norm", "learning_rate", "samples_seen")


def _trainer(layout: str, overrides: list[str], made: Materials, ranks: Ranks) -> tuple[Trainer, MetricsLog]:
    precision, stage, *rest = layout.split("-")
    own = [f"train.precision={precision}", f"deepspeed.zero_optimization.stage={stage}"]
    if rest:
        own.append("deepspeed.zero_optimization.offload_optimizer.device=cpu")
    log = MetricsLog(None)
    return Trainer(config.load(None, [*overrides, *own]), made, ranks, log, Silence()), log


def _keeper(folder: Path, ranks: Ranks) -> Keeper:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return Keeper(RunDirectory(folder), CheckpointOptions(keep_last=9), ranks, patience_s=60, notes=Notes(ranks))


def _finish(trainer: Trainer, log: MetricsLog) -> Ended:
    while not trainer.is_finished:
        trainer.train_epoch()
    weights = {f"student.{key}": value for key, value in trainer.student_weights().items()}
    weights |= {f"teacher.{key}": value for key, value in trainer.teacher_weights().items()}
    weights |= {f"fusion.{key}": value.clone() for key, value in trainer.fusion.state_dict().items()}  # type: ignore[union-attr]
    return weights, log.rows


def _save(ranks: Ranks, out: Path, layout: str, overrides: list[str]) -> Ended:
    """Train to the end under a layout, and keep a checkpoint of the middle."""
    made = materials.gather(config.load(None, overrides), ranks, lambda *_: None)
    trainer, log = _trainer(layout, overrides, made, ranks)
    keeper = _keeper(out / layout, ranks)

    def save() -> None:
        if trainer.progress.step == MIDDLE:
            keeper.save(trainer)

    trainer.train_epoch(save)
    keeper.wait()
    return _finish(trainer, log)


def _go_on(ranks: Ranks, out: Path, saved: str, layout: str, overrides: list[str]) -> Ended:
    """Go on from the checkpoint of a layout under another."""
    made = materials.gather(config.load(None, overrides), ranks, lambda *_: None)
    trainer, log = _trainer(layout, overrides, made, ranks)
    assert _keeper(out / saved, ranks).load(trainer, lambda _: None)
    assert trainer.progress.step == MIDDLE
    return _finish(trainer, log)


@pytest.fixture(scope="module")
def words(on_features: tuple[str, ...]) -> list[str]:
    return [
        *on_features,
        "train.global_batch_size=12",
        f"train.max_steps={END}",
        "train.epochs=2",
        "train.log_every_steps=1",
        "loss.warmup_fraction=0",
    ]


@pytest.fixture(scope="module")
def saved_by(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Callable[[str], tuple[Path, Ended]]:
    """``saved_by(layout)``: where the checkpoint of two ranks is, and how their run ended."""
    folder = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def save(layout: str) -> tuple[Path, Ended]:
        return folder, forked.run(_save, folder, layout, words, size=2)[0]

    return save


def _rows(ended: Ended) -> list[dict[str, Any]]:
    rows = [{k: v for k, v in row.items() if k not in CLOCKS} for row in ended[1]]
    assert [row["step"] for row in rows][-4:] == list(range(MIDDLE + 1, END + 1))
    return rows[-4:]


@pytest.mark.parametrize("layout", SAME)
def test_training_goes_on_bit_equal_at_the_same_layout(saved_by: Any, words: list[str], layout: str) -> None:
    folder, want = saved_by(layout)
    got = forked.run(_go_on, folder, layout, layout, words, size=2)[0]
    assert _rows(got) == _rows(want)
    assert got[0].keys() == want[0].keys()
    assert [key for key in want[0] if not torch.equal(got[0][key].nan_to_num(7.0), want[0][key].nan_to_num(7.0))] == []


@pytest.mark.parametrize(("saved", "size", "layout"), OTHER)
def test_training_goes_on_equal_at_another_layout(
    saved_by: Any, words: list[str], saved: str, size: int, layout: str
) -> None:
    tolerance = 1e-5 if saved.startswith("fp32") else 1e-3
    folder, want = saved_by(saved)
    got = forked.run(_go_on, folder, saved, layout, words, size=size)[0]
    for row, want_row in zip(_rows(got), _rows(want), strict=True):
        for name in FIGURES:
            assert row[name] == pytest.approx(want_row[name], rel=tolerance), name
    for name, value in want[0].items():
        torch.testing.assert_close(got[0][name], value, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)
