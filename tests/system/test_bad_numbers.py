"""A step with a NaN on one of two ranks, or without a sample on any, changes nothing and is told."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from scinet import config, materials
from scinet.data.batch import Batch
from scinet.distributed import Ranks
from scinet.errors import TrainingError
from scinet.objective import Step
from scinet.telemetry import MetricsLog, Silence
from scinet.trainer import Trainer
from tests import ranks as forked

pytestmark = pytest.mark.multiprocess

STAGES = ("0", "3", pytest.param("2", marks=pytest.mark.nightly))
STEPS = 7
BAD = {
    2: "in its input",
    3: "in the output of 'projection'",
    5: "in the gradient at the output of 'label_graph.layers.2'",
}
EMPTY = 6


SPOILT_RANK = 1


def _in_input(_trainer: Trainer, batch: Batch) -> contextlib.AbstractContextManager[Batch]:
    inputs = batch.inputs.clone()
    inputs[3, 5] = float("nan")
    return contextlib.nullcontext(dataclasses.replace(batch, inputs=inputs))


@contextlib.contextmanager
def _in_module(trainer: Trainer, batch: Batch) -> Iterator[Batch]:
    def spoil(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return output * float("inf")

    handle = trainer.engine.network.get_submodule("projection").register_forward_hook(spoil)
    yield batch
    handle.remove()


@contextlib.contextmanager
def _in_gradient(trainer: Trainer, batch: Batch) -> Iterator[Batch]:
    def spoil(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        output.register_hook(lambda gradient: gradient * float("nan"))
        return output

    handle = trainer.engine.network.get_submodule("label_graph").register_forward_hook(spoil)
    yield batch
    handle.remove()


SPOILING: dict[int, Callable[[Trainer, Batch], contextlib.AbstractContextManager[Batch]]] = {
    2: _in_input,
    3: _in_module,
    5: _in_gradient,
}


def _without_samples(batch: Batch) -> Batch:
    """Return what comes of a batch none of whose samples can be read."""
    nothing = {name: torch.zeros_like(getattr(batch, name)) for name in ("inputs", "observed", "truth", "valid")}
    return dataclasses.replace(batch, **nothing, index=-torch.ones_like(batch.index), ids=("",) * len(batch.ids))


class Spoilt(Trainer):
    """A trainer whose rank 1 gets bad numbers in some steps, and in one of which no rank has a sample."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._on: Ranks = arguments[2]
        self.changed: dict[int, list[str]] = {}

    def train_step(self, micro: list[Batch], num_valid: int) -> list[Step]:
        step = self.progress.step + 1
        before = {part.name: part.read().clone() for part in self.state().parts}
        with contextlib.ExitStack() as stack:
            if step in SPOILING and self._on.rank == SPOILT_RANK:
                micro = [stack.enter_context(SPOILING[step](self, batch)) for batch in micro]
            if step == EMPTY:
                micro, num_valid = [_without_samples(batch) for batch in micro], 0
            steps = super().train_step(micro, num_valid)
        after = {part.name: part.read() for part in self.state().parts}
        self.changed[step] = [
            name for name in before if not torch.equal(before[name].nan_to_num(7.0), after[name].nan_to_num(7.0))
        ]
        return steps


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _train(ranks: Ranks, out: Path, stage: str, overrides: list[str]) -> dict[str, Any]:
    """Train with each policy, as one rank, and return what the bad numbers changed and what was said."""
    made = materials.gather(config.load(None, overrides), ranks, lambda *_: None)
    kept = _Kept()
    logging.getLogger("scinet.trainer").addHandler(kept)
    own = (f"deepspeed.zero_optimization.stage={stage}", f"name=stage-{stage}", f"output={out}")
    skipping = config.load(None, [*overrides, *own, "train.on_bad_numbers=skip"])
    log = MetricsLog(None)
    trainer = Spoilt(skipping, made, ranks, log, Silence())
    trainer.train_epoch()
    result: dict[str, Any] = {
        "changed": trainer.changed,
        "rows": log.rows,
        "said": list(kept.lines),
        "bad_steps": trainer.progress.bad_steps,
    }
    for name, words in (("stop", "train.on_bad_numbers=stop"), ("most", "train.max_bad_steps=1")):
        options = config.load(None, [*overrides, *own, "train.on_bad_numbers=skip", words])
        try:
            Spoilt(options, made, ranks, MetricsLog(None), Silence()).train_epoch()
        except TrainingError as error:
            result[name] = str(error)
    return result


@dataclasses.dataclass(frozen=True)
class Trained:
    """The output folder, and what each rank saw at a stage."""

    out: Path
    at: Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, on_features: tuple[str, ...]) -> Trained:
    folder = tmp_path_factory.mktemp("bad-numbers")
    words = [
        *on_features,
        "train.global_batch_size=8",
        f"train.max_steps={STEPS}",
        "train.log_every_steps=1",
        "train.precision=fp32",
        "loss.warmup_fraction=0",
    ]
    return Trained(folder, functools.cache(lambda stage: forked.run(_train, folder, stage, words, size=2)))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rank", [0, 1])
def test_no_state_changes_when_the_numbers_are_bad(trained: Trained, stage: str, rank: int) -> None:
    changed = trained.at(stage)[rank]["changed"]
    for step in range(1, STEPS + 1):
        names = changed[step]
        assert bool(names) == (step not in {*BAD, EMPTY}), f"step {step}: {names[:5]}"
        if step not in {*BAD, EMPTY}:
            for part in ("student/weight/", "teacher/weight/", "fusion/bank", "fusion/memory", "fusion/correlation"):
                assert any(name.startswith(part) for name in names), f"step {step} has left {part} as it was"


@pytest.mark.parametrize("stage", STAGES)
def test_step_rank_samples_and_module_are_named(trained: Trained, stage: str) -> None:
    first, second = (trained.at(stage)[rank] for rank in (0, 1))
    assert first["said"] == second["said"]
    assert first["bad_steps"] == len(BAD)
    *bad, empty = first["said"]
    assert empty == f"step {EMPTY} is left out: none of its samples can be read"
    for line, (step, where) in zip(bad, BAD.items(), strict=True):
        assert line.startswith(f"step {step} has numbers that are not finite, first on rank 1, {where} (samples ")
        assert line.endswith("the step is left out")
        path = trained.out / f"stage-{stage}" / "bad-numbers" / f"step-{step}-rank-1-part-0.safetensors"
        assert str(path) in line
        with safe_open(str(path), framework="pt") as file:
            ids = json.loads(file.metadata()["ids"])
            assert file.metadata()["where"] == where
            inputs = file.get_tensor("inputs")
        assert ids[0] in line
        assert len(ids) == 4
        assert inputs.shape[0] == 12
        assert bool(torch.isfinite(inputs).all()) == (step != 2)
    assert not list((trained.out / f"stage-{stage}" / "bad-numbers").glob("*-rank-0-*"))


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_with_sound_numbers(trained: Trained, stage: str) -> None:
    rows = trained.at(stage)[0]["rows"]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["bad_steps"] for row in rows] == [0, 1, 2, 2, 3, 3, 3]
    for row in rows:
        assert ("loss/total" in row) == (row["step"] not in {*BAD, EMPTY})
        if row["step"] not in {*BAD, EMPTY}:
            assert math.isfinite(row["loss/total"])
            assert math.isfinite(row["gradient_norm"])
    rates = [row["learning_rate"] for row in trained.at("0")[0]["rows"]]
    assert [row["learning_rate"] for row in rows] == pytest.approx(rates), "the schedule goes by steps, bad ones too"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rank", [0, 1])
def test_policy_ends_the_run_on_all_ranks_alike(trained: Trained, stage: str, rank: int) -> None:
    result = trained.at(stage)[rank]
    assert result["stop"].startswith("step 2 has numbers that are not finite, first on rank 1, in its input (samples ")
    assert result["stop"].endswith("or set train.on_bad_numbers=skip")
    assert result["most"].startswith("step 3 has")
    assert result["most"].endswith("it is the 2th in a row, train.max_bad_steps=1")
