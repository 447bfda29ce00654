"""Every ZeRO stage trains on two ranks what plain PyTorch trains in one process: loss curve, student and teacher."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from scinet import config, materials, trainer
from scinet.distributed import Ranks
from scinet.engine import parameter_groups
from scinet.materials import Materials
from scinet.model.network import Network, Output
from scinet.options import Options
from scinet.telemetry import MetricsLog, Silence
from tests import ranks as forked

pytestmark = pytest.mark.multiprocess

TOLERANCE = 1e-5
NORM_TOLERANCE = 5e-5  # plain PyTorch sums squares in fp32, which loses 2e-5 on the CPU
STEPS, STEPS_PER_EPOCH = 20, 5
SAME = (
    *(f"fp32-{stage}" for stage in range(4)),
    "accumulated-2",
    "offload-3",
    "recomputed-0",
    *(
        pytest.param(name, marks=pytest.mark.nightly)
        for name in ("accumulated-0", "accumulated-3", "offload-2", "recomputed-3")
    ),
)
BF16 = (1, 3, *(pytest.param(stage, marks=pytest.mark.nightly) for stage in (0, 2)))
LOSSES = ("loss/total", "loss/supervised", "loss/consistency_weak", "loss/consistency_medium", "loss/distillation")
Trained = tuple[dict[str, Tensor], list[dict[str, Any]]]
Train = Callable[[str], Trained]
STAGES = (0, 1, 2, 3)
PLAIN = "plain"


class PlainEngine:
    """What a trainer needs of an engine, in plain PyTorch."""

    zero_stage = 0

    def __init__(self, network: Network, options: Options, world_size: int, _device: Any, total_steps: int) -> None:
        assert world_size == 1
        self.network, self._clip = network, options.optimizer.gradient_clip
        groups = parameter_groups(network, options.optimizer)
        self._optimizer = torch.optim.AdamW(groups)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer,
            max_lr=[group["lr"] for group in groups],
            total_steps=total_steps + 1,
            pct_start=max(options.optimizer.warmup_share, 2 / (total_steps + 1)),
            cycle_momentum=False,
        )
        self._norm = torch.zeros(())

    def forward(self, inputs: Tensor) -> Output:
        output: Output = self.network(inputs)
        return output

    def step(self, loss: Tensor) -> bool:
        self._optimizer.zero_grad()
        loss.backward()
        self._norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self._clip)
        self._optimizer.step()
        self._schedule.step()
        return True

    def train(self, mode: bool) -> None:
        self.network.train(mode)

    def gradient_norm(self) -> float:
        return float(self._norm)

    def learning_rate(self) -> float:
        return max(self._schedule.get_last_lr())

    def whole_state(self, network: Network) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in network.state_dict().items()}


def configurations() -> dict[str, list[str]]:
    """Return the overrides of each configuration, by name; stage 3 last, since it changes DeepSpeed's linear layer."""
    found = {PLAIN: ["train.precision=fp32"]}
    for stage in STAGES:
        zero = f"deepspeed.zero_optimization.stage={stage}"
        found[f"fp32-{stage}"] = ["train.precision=fp32", zero]
        found[f"bf16-{stage}"] = ["train.precision=bf16", zero]
        if stage != 1:
            found[f"accumulated-{stage}"] = ["train.precision=fp32", zero, "train.accumulation_steps=2"]
        if stage >= 2:
            offload = "deepspeed.zero_optimization.offload_optimizer.device=cpu"
            found[f"offload-{stage}"] = ["train.precision=fp32", zero, offload]
        if stage in (0, 3):
            found[f"recomputed-{stage}"] = ["train.precision=fp32", zero, "model.activation_checkpointing=true"]
    return found


def _train(name: str, options: Options, made: Materials, ranks: Ranks) -> Trained:
    log = MetricsLog(None)
    run = trainer.Trainer(options, made, ranks, log, Silence())
    run.train_epoch()
    while not (run.is_finished or name.startswith("bf16")):
        run.train_epoch()
    state = {f"student.{key}": value for key, value in run.student_weights().items()}
    state |= {f"teacher.{key}": value for key, value in run.teacher_weights().items()}
    return state, log.rows


def _train_as(ranks: Ranks, name: str, overrides: list[str]) -> Trained:
    """Train under one configuration; ``plain`` is the same training in one process without DeepSpeed."""
    made = materials.gather(config.load(None, overrides), ranks, lambda *_: None)
    options = config.load(None, [*overrides, *configurations()[name]])
    if name != PLAIN:
        return _train(name, options, made, ranks)
    with mock.patch.object(trainer, "Engine", PlainEngine):
        return _train(name, options, made, ranks)


@pytest.fixture(scope="module")
def trained(on_features: tuple[str, ...]) -> Train:
    """``trained(name)``: weights and rows of rank 0 of two, or of the only one."""
    overrides = [
        *on_features,
        "train.global_batch_size=16",
        f"train.max_steps={STEPS}",
        "train.log_every_steps=1",
        "loss.warmup_fraction=0",
    ]

    @functools.cache
    def train(name: str) -> Trained:
        found: Trained = forked.run(_train_as, name, overrides, size=1 if name == PLAIN else 2)[0]
        return found

    return train


def _steps(trained: Train, name: str) -> list[dict[str, Any]]:
    return [row for row in trained(name)[1] if "loss/total" in row]


@pytest.mark.parametrize("name", SAME)
def test_training_is_that_of_plain_pytorch(trained: Train, name: str) -> None:
    want, got = _steps(trained, "plain"), _steps(trained, name)
    assert [row["step"] for row in got] == [row["step"] for row in want] == list(range(1, STEPS + 1))
    for want_row, got_row in zip(want, got, strict=True):
        for key in (*LOSSES, "learning_rate"):
            assert got_row[key] == pytest.approx(want_row[key], rel=TOLERANCE), key
        assert got_row["gradient_norm"] == pytest.approx(want_row["gradient_norm"], rel=NORM_TOLERANCE)
    expected, state = trained(PLAIN)[0], trained(name)[0]
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=TOLERANCE, atol=TOLERANCE, msg=key)


@pytest.mark.parametrize("name", SAME)
def test_losses_are_finite_and_weights_move(trained: Train, name: str) -> None:
    steps = _steps(trained, name)
    assert len(steps) == STEPS
    assert all(math.isfinite(row["loss/total"]) and row["loss/total"] > 0 for row in steps)
    assert all(math.isfinite(row["gradient_norm"]) and row["gradient_norm"] > 0 for row in steps)
    state = trained(name)[0]
    moved = state["student.projection.weight"].float() - state["teacher.projection.weight"].float()
    assert moved.abs().max() > 0


@pytest.mark.parametrize("stage", BF16)
def test_bf16_stays_near_fp32(trained: Train, stage: int) -> None:
    wide, narrow = ([row["loss/total"] for row in _steps(trained, name)] for name in ("fp32-0", f"bf16-{stage}"))
    assert len(narrow) == STEPS_PER_EPOCH
    assert narrow == pytest.approx(wide[:STEPS_PER_EPOCH], rel=0.05)
    state = trained(f"bf16-{stage}")[0]
    moved = state["student.projection.weight"].float() - state["teacher.projection.weight"].float()
    assert moved.abs().max() > 0
