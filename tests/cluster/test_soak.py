"""A run that is broken at random comes to what the unbroken one comes to, and a soak would notice if it did not."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from scinet.rundir import RunDirectory
from scinet_cluster import soak
from scinet_cluster.faults import Fault
from scinet_cluster.likeness import differences
from scinet_cluster.soak_plan import Plan


@pytest.mark.multiprocess
@pytest.mark.nightly
@pytest.mark.alone
def test_nothing_is_lost_when_every_fault_befalls_a_run(small: Sequence[str], launch: Any, tmp_path: Path) -> None:
    own = ("train.max_steps=0", "train.epochs=3", "data.workers=1", "data.cache_features=false")
    kills = len(Fault)
    done = launch("scinet", "soak", "--kills", kills, "--out", tmp_path / "out", *small, *own, timeout_s=550)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} faults in " in done.stdout
    assert "bit by bit" in done.stdout
    told = set(re.findall(rf"^\d/{kills} at step \d+: (.*)$", done.stdout, re.MULTILINE))
    assert {fault.value for fault in Fault} - told <= {Fault.kill_loader.value}, "there may be none at the moment"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--kills", "0"), "--kills is 0, but must be at least 1"),
        (("--ranks", "0"), "--ranks is 0, but must be at least 1"),
        (("--out", "."), "is not empty"),
    ],
)
def test_usage_is_refused_in_a_sentence(
    words: Sequence[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert soak.main(["--config", "configs/quickstart.yaml", *words]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.multiprocess
def test_wrong_configuration_is_the_users_mistake(launch: Any, tmp_path: Path) -> None:
    words = ("--config", "configs/quickstart.yaml", "--out", tmp_path / "out", "train.epoch=3")
    done = launch("scinet", "soak", *words)
    assert done.returncode == 2
    assert "unknown key 'train.epoch'; did you mean 'train.epochs'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("status", "befell", "is_in_order"),
    [
        (0, [], True),
        (0, [Fault.kill_rank], True),
        (1, [], False),
        (137, [], False),
        (137, [Fault.kill_rank], True),
        (-9, [Fault.kill_launcher], True),
        (1, [Fault.hang], False),
        (1, [Fault.fill_disk], True),
        (2, [Fault.fill_disk], False),
    ],
)
def test_only_statuses_that_a_scheduler_starts_again_are_in_order(
    status: int, befell: list[Fault], is_in_order: bool
) -> None:
    assert soak._is_in_order(status, befell) is is_in_order


def test_each_fault_comes_once_before_any_comes_again() -> None:
    plan = Plan(30, 7, total_steps=100, first_step_s=1, took_s=10)
    drawn = [plan.draw() for _ in range(12)]
    assert set(drawn[:6]) == set(drawn[6:]) == set(Fault)
    assert plan.left == 18
    assert [Plan(30, 7, total_steps=9, first_step_s=1, took_s=1).draw() for _ in range(3)] == drawn[:1] * 3


def _run(folder: Path) -> RunDirectory:
    run = RunDirectory(folder)
    (run.checkpoints / "selected").mkdir(parents=True)
    (run.checkpoints / "selected/teacher.safetensors").write_bytes(b"weights")
    (run.checkpoints / "selected/student.safetensors").write_bytes(b"weights")
    (run.checkpoints / "step-0000000004").mkdir()
    parts = {"parts": [["part-00000-of-00001.safetensors", 8, "ab" * 32]]}
    (run.checkpoints / "step-0000000004/manifest.json").write_text(json.dumps(parts))
    clock = random.Random(str(folder)).random()
    rows = [{"step": step, "loss/total": 1 / step, "samples_per_second": clock} for step in (1, 2, 3, 4)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.evaluation.write_text(json.dumps({"seconds": clock, "selected": {"epoch": 1}}))
    return run


def test_runs_that_differ_in_clocks_alone_are_alike(tmp_path: Path) -> None:
    assert differences(_run(tmp_path / "one"), _run(tmp_path / "other")) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "sentence"),
    [
        (
            "metrics.jsonl",
            'total": 0.25,',
            'total": 0.2500000000000001,',
            "'loss/total' at step 4: 0.25 and 0.2500000000000001",
        ),
        ("metrics.jsonl", '{"step": 1, "loss/total": 1.0, ', "{", "'loss/total' at step 1: 1.0 and None"),
        ("evaluation.json", '"epoch": 1', '"epoch": 2', "evaluation.json"),
        ("checkpoints/selected/teacher.safetensors", "weights", "weighty", "selected/teacher.safetensors"),
        ("checkpoints/selected/student.safetensors", "weights", "weighty", "selected/student.safetensors"),
        ("checkpoints/step-0000000004/manifest.json", "abab", "abac", "tensors of the checkpoint step-0000000004"),
    ],
)
def test_what_differs_is_named(tmp_path: Path, file: str, old: str, new: str, sentence: str) -> None:
    one, other = _run(tmp_path / "one"), _run(tmp_path / "other")
    path = other.path / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    found = "; ".join(differences(one, other))
    assert sentence in found


def test_missing_rows_and_checkpoints_are_named(tmp_path: Path) -> None:
    one, other = _run(tmp_path / "one"), _run(tmp_path / "other")
    other.metrics.write_text("".join(other.metrics.read_text().splitlines(keepends=True)[:3]))
    (other.checkpoints / "step-0000000004").rename(other.checkpoints / "step-0000000003")
    assert differences(one, other) == [
        "4 rows of metrics and 3",
        "there is no checkpoint of the same step",
    ]
