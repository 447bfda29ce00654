"""One rank of the test of bad numbers: spoils some steps on one rank, and writes what they changed and what was said.

Usage, under torchrun: worker_bad_numbers.py OUT STAGE,STAGE key=value ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scinet import config, materials
from scinet.data.batch import Batch
from scinet.distributed import Ranks, initialise, shut_down
from scinet.errors import TrainingError
from scinet.objective import Step
from scinet.telemetry import MetricsLog, Silence
from scinet.trainer import Trainer

SPOILT_RANK = 1
EMPTY_STEP = 6


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
            if step == EMPTY_STEP:
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


def main(out: Path, stages: list[str], overrides: list[str]) -> None:
    ranks = initialise(120)
    made = materials.gather(config.load(None, overrides), ranks, lambda *_: None)
    for stage in stages:
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
            "said": kept.lines,
            "bad_steps": trainer.progress.bad_steps,
        }
        logging.getLogger("scinet.trainer").removeHandler(kept)
        for name, words in (("stop", "train.on_bad_numbers=stop"), ("most", "train.max_bad_steps=1")):
            options = config.load(None, [*overrides, *own, "train.on_bad_numbers=skip", words])
            try:
                Spoilt(options, made, ranks, MetricsLog(None), Silence()).train_epoch()
            except TrainingError as error:
                result[name] = str(error)
        (out / f"{stage}-{ranks.rank}.json").write_text(json.dumps(result))
    shut_down()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
