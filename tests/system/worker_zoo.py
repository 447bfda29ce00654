"""One rank of the zoo's test: trains each method for three epochs, whole and from a checkpoint, and writes its end.

Usage, under torchrun: worker_zoo.py OUT METHOD[,METHOD:HEAD] key=value ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from scinet import config, materials
from scinet.checkpoint.keeper import Keeper
from scinet.distributed import initialise, shut_down
from scinet.materials import Materials
from scinet.notes import Notes
from scinet.options import CheckpointOptions
from scinet.rundir import RunDirectory
from scinet.telemetry import MetricsLog, Silence
from scinet.trainer import Trainer

MIDDLE = 7  # steps; an epoch has five
HEADS = {
    "regions": ("model.head=prompt_regions", "data.cached_regions=2"),
    "linear": ("model.head=linear",),
    "cam": ("model.head=cam", "model.boost_alpha=5", "data.cached_regions=2"),
    "ml_decoder": ("model.head=ml_decoder", "data.cached_regions=2", "model.decoder_groups=20"),
    "dualcoop": ("model.head=dualcoop", "data.cached_regions=2", "optimizer.head_learning_rate=1e-4"),
}


def _end(trainer: Trainer) -> dict[str, Tensor]:
    return {part.name: part.read().view(part.shape).clone().contiguous() for part in trainer.state().parts}


def main(out: Path, methods: list[str], overrides: list[str]) -> None:
    ranks = initialise(120)
    made: dict[int, Materials] = {}
    for method in methods:
        name, _, head = method.partition(":")
        options = config.load(None, [*overrides, f"method={name}", *(HEADS[head] if head else ())])
        regions = options.data.cached_regions
        if regions not in made:
            made[regions] = materials.gather(options, ranks, lambda *_: None)
        log = MetricsLog(None)
        trainer = Trainer(options, made[regions], ranks, log, Silence())
        folder = out / method
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        keeper = Keeper(RunDirectory(folder), CheckpointOptions(), ranks, patience_s=60, notes=Notes(ranks))

        def save(trainer: Trainer = trainer, keeper: Keeper = keeper) -> None:
            if trainer.progress.step == MIDDLE:
                keeper.save(trainer)

        while not trainer.is_finished:
            trainer.train_epoch(save)
        keeper.wait()
        whole = _end(trainer)
        again = Trainer(options, made[regions], ranks, MetricsLog(None), Silence())
        assert keeper.load(again, lambda _: None)
        assert again.progress.step == MIDDLE
        while not again.is_finished:
            again.train_epoch()
        resumed = _end(again)
        differing = [name for name, value in whole.items() if not torch.equal(_bits(value), _bits(resumed[name]))]
        if ranks.is_first:
            save_file(whole, str(out / f"{method}.safetensors"))
            (out / f"{method}.json").write_text(json.dumps({"rows": log.rows, "differing": differing}))
    shut_down()


def _bits(value: Tensor) -> Tensor:
    """Return a tensor whose NaNs are equal to themselves."""
    return value.contiguous().view(-1).view(torch.uint8)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
