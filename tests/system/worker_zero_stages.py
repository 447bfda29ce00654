"""One rank of the ZeRO test: trains three steps under each configuration of one launch, and writes how they went.

Usage, under torchrun: worker_zero_stages.py OUT key=value ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from scinet import config, materials
from scinet.distributed import initialise, shut_down
from scinet.telemetry import MetricsLog, Silence
from scinet.trainer import Trainer

STAGES = (0, 1, 2, 3)
ACCUMULATED_STAGES = (0, 2)


def configurations() -> dict[str, list[str]]:
    """Return the overrides of each configuration, by name."""
    found = {}
    for stage in STAGES:
        for precision in ("fp32", "bf16"):
            own = [f"train.precision={precision}", f"deepspeed.zero_optimization.stage={stage}"]
            found[f"{precision}-{stage}"] = own
    for stage in ACCUMULATED_STAGES:
        found[f"accumulated-{stage}"] = [
            "train.precision=fp32",
            "train.accumulation_steps=2",
            f"deepspeed.zero_optimization.stage={stage}",
        ]
    return found


def main(out: Path, overrides: list[str]) -> None:
    ranks = initialise(120)
    made = materials.gather(config.load(None, overrides), ranks, lambda *_: None)
    rows = {}
    for name, own in configurations().items():
        log = MetricsLog(None)
        trainer = Trainer(config.load(None, [*overrides, *own]), made, ranks, log, Silence())
        trainer.train_epoch()
        rows[name] = log.rows
        student, teacher = trainer.student_state(), trainer.teacher.state_dict()
        state = {f"student.{key}": value for key, value in student.items()}
        state |= {f"teacher.{key}": value for key, value in teacher.items()}
        if ranks.is_first:
            save_file(
                {key: value.contiguous().clone() for key, value in state.items()}, str(out / f"{name}.safetensors")
            )
    if ranks.is_first:
        (out / "rows.json").write_text(json.dumps(rows))
    shut_down()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
