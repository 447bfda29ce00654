"""A run that is killed at any step goes on as if nothing had been: the same losses and weights, bit by bit."""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from scinet import train
from scinet.trainer import Trainer
from tests import ranks as forked

EPOCHS = 4
STEPS_PER_EPOCH = 6  # five and a short one
CLOCKS = {"samples_per_second", "data_wait_share"}


@pytest.fixture(scope="module")
def words(small: tuple[str, ...], scenes: Path) -> tuple[str, ...]:
    del scenes
    return (
        *small,
        "train.max_steps=0",
        "data.cache_features=false",
        "data.shuffle_window=8",
        f"train.epochs={EPOCHS}",
        "train.precision=fp32",
        "train.last_batch=train",
        "checkpoint.every_steps=2",
        "train.log_every_steps=3",  # no multiple of the above: sums since the last line must be saved too
        "loss.warmup_fraction=0.1",
        "loss.threshold_window=40",
    )


def _train(words: list[str], delay_s: float = 0.0) -> int:
    """Run the training command; slowed down, a step takes longer than looking for its checkpoint."""
    step = Trainer.train_step

    def slow(self: Trainer, *arguments: Any) -> Any:
        time.sleep(delay_s)
        return step(self, *arguments)

    with mock.patch.object(Trainer, "train_step", slow):
        return train.main(words)


@pytest.fixture(scope="module")
def unbroken(words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken")
    (run,) = forked.start(_train, [*words, f"output={output}", "name=run"], size=1)
    status, lines = run.end(200)
    run.kill()
    assert status == 0, lines
    return output / "run"


def _rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]


def _saved_step(run: Path) -> int:
    path = run / "checkpoints" / "latest.json"
    return int(json.loads(path.read_text())["tag"].rpartition("-")[2]) if path.exists() else 0


def _kill_after(step: int, words: list[str], run: Path, delay_s: float) -> None:
    """Start a run and kill it some time after the checkpoint of a step."""
    (process,) = forked.start(_train, words, 0.1, size=1)
    try:
        end = time.monotonic() + 200
        while _saved_step(run) < step and process.process.is_alive() and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(delay_s)
        assert process.process.is_alive(), process.log.read_text()[-3000:]
    finally:
        process.kill()


def _assert_same(run: Path, unbroken: Path) -> None:
    assert _rows(run) == _rows(unbroken)
    mine, theirs = (sorted((folder / "checkpoints").glob("step-*/part-*")) for folder in (run, unbroken))
    assert [path.parts[-2:] for path in mine] == [path.parts[-2:] for path in theirs]
    pairs = list(zip(mine, theirs, strict=True))
    for who in ("teacher", "student"):
        pairs.append(
            (run / f"checkpoints/selected/{who}.safetensors", unbroken / f"checkpoints/selected/{who}.safetensors")
        )
    for first, second in pairs:
        got, want = load_file(str(first)), load_file(str(second))
        assert got.keys() == want.keys()
        assert [name for name in want if not torch.equal(got[name].nan_to_num(7.0), want[name].nan_to_num(7.0))] == []
    evaluations = [json.loads((folder / "evaluation.json").read_text()) for folder in (run, unbroken)]
    assert evaluations[0]["last"] == evaluations[1]["last"]
    assert evaluations[0]["selected"] == evaluations[1]["selected"]


@pytest.mark.parametrize("epoch", [0, 3])
def test_run_ends_bit_equal_when_it_was_killed_within_an_epoch(
    words: tuple[str, ...], unbroken: Path, launch: Any, tmp_path: Path, epoch: int
) -> None:
    chance = random.Random(time.time_ns())
    step, delay_s = epoch * STEPS_PER_EPOCH + chance.choice([2, 4]), chance.random() * 0.05
    print(f"killed {delay_s:.3f} s after step {step}")
    run = tmp_path / "run"
    own = [*words, f"output={tmp_path}", "name=run"]
    _kill_after(step, own, run, delay_s)
    saved = _saved_step(run)
    assert step <= saved < (epoch + 1) * STEPS_PER_EPOCH, "the kill came within the epoch"
    resumed = launch(sys.executable, "scinet/train.py", *own, "resume=true", "data.workers=2")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert f"at step {saved}\n" in resumed.stderr
    _assert_same(run, unbroken)


def _train_on_a_disk_that_fills_up(words: list[str]) -> int:
    """Run the training command; from the fourth step on no file can grow beyond 20 kB."""
    step = Trainer.train_step

    def filled(self: Trainer, *arguments: Any) -> Any:
        if self.progress.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return step(self, *arguments)

    with mock.patch.object(Trainer, "train_step", filled):
        return train.main(words)


def test_run_goes_on_bit_equal_when_its_disk_was_full(words: tuple[str, ...], unbroken: Path, tmp_path: Path) -> None:
    own = [*words, f"output={tmp_path}", "name=run"]
    (full,) = forked.start(_train_on_a_disk_that_fills_up, own, size=1)
    status, lines = full.end(200)
    full.kill()
    assert status == 1, lines
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert "selected/teacher.safetensors cannot be written (" in error
    assert "--resume auto goes on" in error
    assert not any("Traceback" in line for line in lines)
    assert _saved_step(tmp_path / "run") == 2, "the checkpoint of step 4 found no room, that of step 2 stays"
    steps = [row["step"] for row in _rows(tmp_path / "run") if "loss/total" in row]
    assert steps == [3, 6], "training went on until the selected weights had to be written"
    (again,) = forked.start(_train, [*own, "resume=true"], size=1)
    status, lines = again.end(200)
    again.kill()
    assert status == 0, lines
    _assert_same(tmp_path / "run", unbroken)
