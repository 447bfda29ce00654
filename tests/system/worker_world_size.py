"""One rank of the world-size test: trains five steps a mode and writes what must not depend on the number of ranks.

Usage, under torchrun: worker_world_size.py OUT MODE[,MODE] key=value ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from scinet import config, materials
from scinet.data.batch import Batch
from scinet.distributed import Ranks, gather_rows, initialise, shut_down, sum_over_ranks
from scinet.objective import Step
from scinet.telemetry import MetricsLog, Silence
from scinet.trainer import Trainer

# Features: five steps are the whole run, over the peak of the learning rate. Images: the first five of a longer run;
# at its peak AdamW makes the rounding of a whole tower's tiny gradients into visible steps within five of them.
MODES = {
    "features": ("model.freeze_image=true", "data.cache_features=true", "train.epochs=1"),
    "images": ("model.freeze_image=false", "data.cache_features=false", "train.epochs=20"),
}


class Recorder(Trainer):
    """A trainer that keeps what each step computed, for the global batch."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._seen_by = arguments[2]
        self.tensors: dict[str, Tensor] = {}
        self.rows: list[dict[str, Any]] = []

    def micro_step(self, batch: Batch, epoch: int, size: float) -> Step:
        ranks: Ranks = self._seen_by
        step = super().micro_step(batch, epoch, size)
        assert step.confidence is not None
        assert self.fusion is not None
        number = len(self.rows)
        ids: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(ids, batch.ids)
        parts = {name: float(sum_over_ranks(part, ranks)) for name, part in step.parts.items()}
        loss = float(sum_over_ranks(step.loss.detach(), ranks))
        self.rows.append(
            {
                "ids": [name for together in zip(*ids, strict=True) for name in together],
                "loss": loss,
                "gradient_norm": self.engine.gradient_norm(),
                **parts,
            }
        )
        bank = self.fusion.bank.rows()
        self.tensors |= {
            f"{number}.confidence": gather_rows(step.confidence.unified.detach(), ranks),
            f"{number}.thresholds": self.thresholds.thresholds(),
            f"{number}.correlation": self.fusion.correlation.shrunk(),
            f"{number}.bank.embeddings": bank.embeddings.clone(),
            f"{number}.bank.observed": bank.observed.clone(),
            f"{number}.bank.indices": bank.indices.clone(),
        }
        return step


def main(out: Path, modes: list[str], overrides: list[str]) -> None:
    ranks = initialise(120)
    for mode in modes:
        options = config.load(None, [*overrides, *MODES[mode]])
        made = materials.gather(options, ranks, lambda *_: None)
        trainer = Recorder(options, made, ranks, MetricsLog(None), Silence())
        start = {f"start.student.{name}": value for name, value in trainer.student_state().items()}
        start |= {f"start.{name}": value.clone() for name, value in trainer.state_dict().items()}
        next(trainer.epochs())
        end = {f"end.student.{name}": value for name, value in trainer.student_state().items()}
        end |= {f"end.{name}": value for name, value in trainer.state_dict().items()}
        tensors = {name: value.contiguous().clone() for name, value in (start | trainer.tensors | end).items()}
        save_file(tensors, str(out / f"{mode}-{ranks.rank}.safetensors"))
        (out / f"{mode}-{ranks.rank}.json").write_text(json.dumps(trainer.rows))
    shut_down()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
