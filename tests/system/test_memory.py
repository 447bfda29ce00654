"""The memory estimate is held against real runs: tensors under each ZeRO stage, and the process as a whole."""

from __future__ import annotations

import gc
import re
import sys
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from scinet import config, estimating, fitting, materials, memory
from scinet.distributed import Ranks
from scinet.memory import Moment, Subject
from scinet.room import Room
from scinet.telemetry import MetricsLog, Silence
from scinet.trainer import Trainer
from tests import ranks as forked

pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).resolve().parents[2]
FINE_TUNED = ("data.cache_features=false", "model.freeze_image=false", "model.image_size=64")
CASES = (
    ("0", "fp32"),
    ("3", "bf16"),
    *(
        pytest.param(*case, marks=pytest.mark.nightly)
        for case in (("0", "bf16"), ("1", "bf16"), ("2", "fp32"), ("3", "fp32"))
    ),
)
# what a bucket is not filled with is not taken: here tensors are counted, so it is made as small as the weights
SIZES = (
    "train.global_batch_size=4",
    "fusion.bank_size=0",
    "deepspeed.zero_optimization.reduce_bucket_size=6000000",
)


OF_WEIGHTS = ("trainable", "small weights", "gradients", "fp32 master", "AdamW's moments", "teacher")


def live_bytes() -> int:
    """Return the bytes of all tensors that Python can see, each storage once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type != "meta":
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(found.values())


def _measure(ranks: Ranks, overrides: list[str]) -> tuple[int, float]:
    """Return the bytes that a rank has before its second update, and the estimate of the parts that are there then."""
    warnings.simplefilter("ignore")
    options = config.load(None, overrides)
    made = materials.gather(options, ranks, lambda *_: None)
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


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_state_of_the_weights_is_that_of_deepspeeds_tensors(scenes: Path, stage: str, precision: str) -> None:
    own = [f"train.precision={precision}", f"deepspeed.zero_optimization.stage={stage}"]
    words = [f"data.path={scenes}", *FINE_TUNED, *SIZES, *own]
    measured, estimated = forked.run(_measure, words, size=2)[0]
    assert estimated == pytest.approx(measured, rel=0.1)


@pytest.mark.nightly
def test_estimate_is_near_the_growth_of_a_real_run(launch: Any, scenes: Path) -> None:
    words = ("--config", ROOT / "configs/quickstart.yaml", f"data.path={scenes}", *FINE_TUNED)
    command = (sys.executable, "-m", "scinet.cli", "bench", "memory", *words, "train.global_batch_size=32")
    done = launch(*command, "--threads", 1, timeout_s=400)
    assert done.returncode == 0, done.stderr[-3000:]
    (ratio,) = re.findall(r"measured, ([\d.]+) of it estimated", done.stdout)
    assert 0.7 <= float(ratio) <= 1.4, done.stdout


def test_run_that_cannot_fit_ends_before_it_begins(
    train: Any, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "look", lambda *_: Room(None, 2**20, "here"))
    result = train(*small, f"output={tmp_path}", "name=large")
    assert result.status == 2
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert "1.0 MiB are free" in line
    assert not (tmp_path / "large").exists()


def test_run_that_fits_says_what_it_takes(train: Any, small: tuple[str, ...], tmp_path: Path) -> None:
    result = train(*small, f"output={tmp_path}", "name=one", "train.max_steps=1")
    assert result.status == 0, result.err
    assert sum(line.startswith("memory of a rank, beyond the towers: ") for line in result.err.splitlines()) == 1
