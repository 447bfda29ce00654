"""One rank of the checkpoint test: trains under each layout of one launch, saves midway, and goes on from files.

Usage, under torchrun: worker_checkpoint.py OUT SAVING,SAVING LOADING,LOADING key=value ...

A layout is PRECISION-STAGE, with `-offload` for the optimiser on the CPU. For each layout to save, the run is carried
to its end and a checkpoint is kept of its middle; SAVED:LAYOUT goes on from one of those. Stage 3 comes last: from then
on DeepSpeed multiplies by weights in another order of operations, which is another rounding.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from scinet import config, materials
from scinet.checkpoint.keeper import Keeper
from scinet.distributed import Ranks, initialise, shut_down
from scinet.materials import Materials
from scinet.notes import Notes
from scinet.options import CheckpointOptions
from scinet.rundir import RunDirectory
from scinet.telemetry import MetricsLog, Silence
from scinet.trainer import Trainer

MIDDLE = 4


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


def _finish(trainer: Trainer, log: MetricsLog, ranks: Ranks, out: Path, name: str) -> None:
    while not trainer.is_finished:
        trainer.train_epoch()
    weights = {f"student.{key}": value for key, value in trainer.student_weights().items()}
    weights |= {f"teacher.{key}": value for key, value in trainer.teacher_weights().items()}
    weights |= {f"fusion.{key}": value.contiguous().clone() for key, value in trainer.fusion.state_dict().items()}  # type: ignore[union-attr]
    if ranks.is_first:
        save_file(weights, str(out / f"{name}.safetensors"))
        (out / f"{name}.json").write_text(json.dumps(log.rows))


def main(out: Path, saving: list[str], loading: list[str], overrides: list[str]) -> None:
    ranks = initialise(120)
    made = materials.gather(config.load(None, overrides), ranks, lambda *_: None)
    for layout in filter(None, saving):
        trainer, log = _trainer(layout, overrides, made, ranks)
        keeper = _keeper(out / f"{ranks.world_size}x{layout}", ranks)

        def save(trainer: Trainer = trainer, keeper: Keeper = keeper) -> None:
            if trainer.progress.step == MIDDLE:
                keeper.save(trainer)

        trainer.train_epoch(save)
        keeper.wait()
        _finish(trainer, log, ranks, out, f"{ranks.world_size}x{layout}")
    for saved, _, layout in (word.partition(":") for word in loading):
        trainer, log = _trainer(layout, overrides, made, ranks)
        assert _keeper(out / saved, ranks).load(trainer, lambda _: None)
        assert trainer.progress.step == MIDDLE
        _finish(trainer, log, ranks, out, f"{saved}-to-{ranks.world_size}x{layout}")
    shut_down()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(","), sys.argv[4:])
