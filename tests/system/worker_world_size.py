"""One rank of the world-size test: trains five steps a mode and writes what must not depend on the number of ranks.

Usage, under torchrun: worker_world_size.py OUT MODE[,MODE] key=value MODE:key=value ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scinet import config, materials
from scinet.data.batch import Batch
from scinet.distributed import Ranks, gather_objects, gather_rows, initialise, shut_down, sum_over_ranks
from scinet.objective import Objective, Step
from scinet.telemetry import MetricsLog, Silence
from scinet.trainer import Trainer

# Features: five steps are the whole run, over the peak of the learning rate. Images: the first five of a longer run;
# at its peak AdamW makes the rounding of a whole tower's tiny gradients into visible steps within five of them.
FEATURES = ("model.freeze_image=true", "data.cache_features=true", "train.epochs=1")
IMAGES = ("model.freeze_image=false", "data.cache_features=false", "train.epochs=20")
GAPS = ("train.last_batch=train", "data.on_bad_sample=skip", "data.max_bad_fraction=0.1")
MODES = {
    "features": FEATURES,
    "images": IMAGES,
    "short": (*FEATURES, "train.last_batch=train"),
    "skipped": (*FEATURES, *GAPS),
    "skipped-images": (*IMAGES, *GAPS),
    "whole-bce": (*FEATURES, *GAPS, "method=bce"),
    "accumulated": (*FEATURES, *GAPS, "train.accumulation_steps=2"),
    "accumulated-bce": (*FEATURES, *GAPS, "method=bce", "train.accumulation_steps=2"),
}


class Recorder(Trainer):
    """A trainer that keeps what each step computed, for the global batch."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._seen_by = arguments[2]
        self.tensors: dict[str, Tensor] = {}
        self.rows: list[dict[str, Any]] = []

    def train_step(self, micro: list[Batch], num_valid: int) -> list[Step]:
        ranks: Ranks = self._seen_by
        number = len(self.rows)
        steps = super().train_step(micro, num_valid)
        ids = [name for batch in micro for name in gather_objects(list(batch.ids), ranks)]
        row: dict[str, Any] = {"ids": ids, "gradient_norm": self.engine.gradient_norm()}
        for name in ("loss", *steps[0].parts):
            values = [step.loss.detach() if name == "loss" else step.parts[name] for step in steps]
            row[name] = float(sum_over_ranks(torch.stack(values).mean(), ranks))
        self.rows.append(row)
        if number == 0:
            # AdamW's first moments of the first step are its gradients, element by element, times a constant
            self.tensors |= {name: value for name, value in _state(self, "gradient").items() if "/exp_avg/" in name}
        if not isinstance(self._aim, Objective):
            return steps
        unified = [step.confidence.unified.detach() for step in steps if step.confidence is not None]
        valid = torch.cat([gather_rows(batch.valid, ranks) for batch in micro])
        fusion = self._aim.fusion
        bank = fusion.bank.rows()
        self.tensors |= {
            f"{number}.confidence": torch.cat([gather_rows(rows, ranks) for rows in unified])[valid],
            f"{number}.thresholds": self._aim.thresholds.thresholds(),
            f"{number}.correlation": fusion.correlation.shrunk(),
            f"{number}.bank.embeddings": bank.embeddings.clone(),
            f"{number}.bank.observed": bank.observed.clone(),
            f"{number}.bank.indices": bank.indices.clone(),
        }
        return steps


def _state(trainer: Trainer, moment: str) -> dict[str, Tensor]:
    """Return all that a trainer keeps."""
    return {f"{moment}.{part.name}": part.read().view(part.shape).clone() for part in trainer.state().parts}


def _without_kinks(tower: nn.Module) -> None:
    """Give a tower smooth activations: where rounding moves one over a kink, gradients change by more than 1e-5."""
    for module in list(tower.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.GELU())


def main(out: Path, modes: list[str], overrides: list[str]) -> None:
    ranks = initialise(120)
    for mode in modes:
        own = [word.removeprefix(f"{mode}:") for word in overrides if word.startswith(f"{mode}:")]
        shared = [word for word in overrides if word.partition(":")[0] not in MODES]
        options = config.load(None, [*shared, *own, *MODES[mode]])
        made = materials.gather(options, ranks, lambda *_: None)
        if not options.model.freeze_image:
            _without_kinks(made.backbone.image)
        trainer = Recorder(options, made, ranks, MetricsLog(None), Silence())
        start = _state(trainer, "start")
        trainer.train_epoch()
        tensors = {
            name: value.contiguous() for name, value in (start | trainer.tensors | _state(trainer, "end")).items()
        }
        save_file(tensors, str(out / f"{mode}-{ranks.rank}.safetensors"))
        (out / f"{mode}-{ranks.rank}.json").write_text(json.dumps(trainer.rows))
    shut_down()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
