"""One rank of the memory test: what DeepSpeed, AdamW and the weights hold before a second update, beside the estimate.

Usage, under torchrun: worker_memory.py OUT STAGE-PRECISION,STAGE-PRECISION key=value ...
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from scinet import config, estimating, materials, memory
from scinet.distributed import Ranks, initialise, shut_down
from scinet.materials import Materials
from scinet.memory import Moment, Subject
from scinet.options import Options
from scinet.telemetry import MetricsLog, Silence
from scinet.trainer import Trainer

OF_WEIGHTS = ("trainable", "small weights", "gradients", "fp32 master", "AdamW's moments", "teacher")


def live_bytes() -> int:
    """Return the bytes of all tensors that Python can see, each storage once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type != "meta":
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(found.values())


def measure(options: Options, made: Materials, ranks: Ranks) -> tuple[int, float]:
    """Return the bytes before the second update, and the estimate of the parts that are there then."""
    subject = Subject(estimating.of_card(made.card), made.backbone, made.card.class_names, ranks.device)
    found = memory.estimate(options, subject, ranks.world_size)
    estimated = sum(
        part.num_bytes
        for part in found.parts
        if (part.moment is Moment.always and part.what.startswith(OF_WEIGHTS))
        # ZeRO 3 keeps its bucket from one step to the next
        or (part.what.startswith("ZeRO's bucket") and options.deepspeed["zero_optimization"]["stage"] == 3)
    )
    start, seen = live_bytes(), []
    trainer = Trainer(options, made, ranks, MetricsLog(None), Silence())
    engine: Any = trainer.engine._engine
    step = engine.step

    def watched() -> None:
        seen.append(live_bytes() - start)
        step()

    engine.step = watched
    trainer.engine.train(True)
    for batch in islice(trainer._source.epoch(0), 2):
        trainer.train_step([batch], options.train.global_batch_size)
    return seen[1], estimated


def main(out: Path, cases: list[str], overrides: list[str]) -> None:
    ranks = initialise(120)
    plain = config.load(None, overrides)
    made = materials.gather(plain, ranks, lambda *_: None)
    rows = {}
    for case in cases:
        stage, precision = case.split("-")
        own = [f"train.precision={precision}", f"deepspeed.zero_optimization.stage={stage}"]
        rows[case] = measure(config.load(None, [*overrides, *own]), made, ranks)
    if ranks.is_first:
        (out / "rows.json").write_text(json.dumps(rows))
    shut_down()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
