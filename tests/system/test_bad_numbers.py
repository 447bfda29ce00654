"""A step with a NaN on one of two ranks, or without a sample on any, changes nothing and is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

WORKER = Path(__file__).parent / "worker_bad_numbers.py"
STAGES = ("0", "2", "3")
STEPS = 7
BAD = {
    2: "in its input",
    3: "in the output of 'projection'",
    5: "in the gradient at the output of 'label_graph.layers.2'",
}
EMPTY = 6


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, on_features: tuple[str, ...], launch: Any) -> Path:
    folder = tmp_path_factory.mktemp("bad-numbers")
    words = (
        *on_features,
        "train.global_batch_size=8",
        f"train.max_steps={STEPS}",
        "train.log_every_steps=1",
        "train.precision=fp32",
        "loss.warmup_fraction=0",
    )
    done = launch("torchrun", "--nproc-per-node", 2, WORKER, folder, ",".join(STAGES), *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def _result(out: Path, stage: str, rank: int) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / f"{stage}-{rank}.json").read_text())
    return result


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rank", [0, 1])
def test_no_state_changes_when_the_numbers_are_bad(out: Path, stage: str, rank: int) -> None:
    changed = _result(out, stage, rank)["changed"]
    for step in range(1, STEPS + 1):
        names = changed[str(step)]
        assert bool(names) == (step not in {*BAD, EMPTY}), f"step {step}: {names[:5]}"
        if step not in {*BAD, EMPTY}:
            for part in ("student/weight/", "teacher/weight/", "fusion/bank", "fusion/memory", "fusion/correlation"):
                assert any(name.startswith(part) for name in names), f"step {step} has left {part} as it was"


@pytest.mark.parametrize("stage", STAGES)
def test_step_rank_samples_and_module_are_named(out: Path, stage: str) -> None:
    first, second = (_result(out, stage, rank) for rank in (0, 1))
    assert first["said"] == second["said"]
    assert first["bad_steps"] == len(BAD)
    *bad, empty = first["said"]
    assert empty == f"step {EMPTY} is left out: none of its samples can be read"
    for line, (step, where) in zip(bad, BAD.items(), strict=True):
        assert line.startswith(f"step {step} has numbers that are not finite, first on rank 1, {where} (samples ")
        assert line.endswith("the step is left out")
        path = out / f"stage-{stage}" / "bad-numbers" / f"step-{step}-rank-1-part-0.safetensors"
        assert str(path) in line
        with safe_open(str(path), framework="pt") as file:
            ids = json.loads(file.metadata()["ids"])
            assert file.metadata()["where"] == where
            inputs = file.get_tensor("inputs")
        assert ids[0] in line
        assert len(ids) == 4
        assert inputs.shape[0] == 12
        assert bool(torch.isfinite(inputs).all()) == (step != 2)
    assert not list((out / f"stage-{stage}" / "bad-numbers").glob("*-rank-0-*"))


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_with_sound_numbers(out: Path, stage: str) -> None:
    rows = _result(out, stage, 0)["rows"]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["bad_steps"] for row in rows] == [0, 1, 2, 2, 3, 3, 3]
    for row in rows:
        assert ("loss/total" in row) == (row["step"] not in {*BAD, EMPTY})
        if row["step"] not in {*BAD, EMPTY}:
            assert math.isfinite(row["loss/total"])
            assert math.isfinite(row["gradient_norm"])
    rates = [row["learning_rate"] for row in _result(out, "0", 0)["rows"]]
    assert [row["learning_rate"] for row in rows] == pytest.approx(rates), "the schedule goes by steps, bad ones too"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rank", [0, 1])
def test_policy_ends_the_run_on_all_ranks_alike(out: Path, stage: str, rank: int) -> None:
    result = _result(out, stage, rank)
    assert result["stop"].startswith("step 2 has numbers that are not finite, first on rank 1, in its input (samples ")
    assert result["stop"].endswith("or set train.on_bad_numbers=skip")
    assert result["most"].startswith("step 3 has")
    assert result["most"].endswith("it is the 2th in a row, train.max_bad_steps=1")
