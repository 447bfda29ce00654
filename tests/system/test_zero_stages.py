"""Every ZeRO stage trains on two ranks what plain PyTorch trains in one process: loss curve, student and teacher."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

WORKER = Path(__file__).parent / "worker_zero_stages.py"
TOLERANCE = 1e-5
NORM_TOLERANCE = 5e-5  # plain PyTorch sums squares in fp32, which loses 2e-5 on the CPU
STEPS, STEPS_PER_EPOCH = 20, 5
SAME = (
    *(f"fp32-{stage}" for stage in range(4)),
    *(f"accumulated-{stage}" for stage in (0, 2, 3)),
    *(f"offload-{stage}" for stage in (2, 3)),
    *(f"recomputed-{stage}" for stage in (0, 3)),
)
LOSSES = ("loss/total", "loss/supervised", "loss/consistency_weak", "loss/consistency_medium", "loss/distillation")
Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, on_features: tuple[str, ...], launch: Any) -> Path:
    """What two ranks wrote under all configurations, in one launch."""
    out = tmp_path_factory.mktemp("zero")
    overrides = (
        *on_features,
        "train.global_batch_size=16",
        f"train.max_steps={STEPS}",
        "train.log_every_steps=1",
        "loss.warmup_fraction=0",
    )
    done = launch("torchrun", "--nproc-per-node", 2, WORKER, out, *overrides, timeout_s=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def rows(folder: Path) -> Rows:
    found: Rows = json.loads((folder / "rows.json").read_text())
    return found


def _steps(rows: Rows, name: str) -> list[dict[str, Any]]:
    return [row for row in rows[name] if "loss/total" in row]


@pytest.mark.parametrize("name", SAME)
def test_training_is_that_of_plain_pytorch(folder: Path, rows: Rows, name: str) -> None:
    want, got = _steps(rows, "plain"), _steps(rows, name)
    assert [row["step"] for row in got] == [row["step"] for row in want] == list(range(1, STEPS + 1))
    for want_row, got_row in zip(want, got, strict=True):
        for key in (*LOSSES, "learning_rate"):
            assert got_row[key] == pytest.approx(want_row[key], rel=TOLERANCE), key
        assert got_row["gradient_norm"] == pytest.approx(want_row["gradient_norm"], rel=NORM_TOLERANCE)
    expected = load_file(str(folder / "plain.safetensors"))
    state = load_file(str(folder / f"{name}.safetensors"))
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=TOLERANCE, atol=TOLERANCE, msg=key)


@pytest.mark.parametrize("name", [*SAME, *(f"bf16-{stage}" for stage in range(4))])
def test_losses_are_finite_and_weights_move(folder: Path, rows: Rows, name: str) -> None:
    steps = _steps(rows, name)
    assert len(steps) == (STEPS_PER_EPOCH if name.startswith("bf16") else STEPS)
    assert all(math.isfinite(row["loss/total"]) and row["loss/total"] > 0 for row in steps)
    assert all(math.isfinite(row["gradient_norm"]) and row["gradient_norm"] > 0 for row in steps)
    state = load_file(str(folder / f"{name}.safetensors"))
    moved = state["student.projection.weight"].float() - state["teacher.projection.weight"].float()
    assert moved.abs().max() > 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_stays_near_fp32(rows: Rows, stage: int) -> None:
    wide, narrow = ([row["loss/total"] for row in _steps(rows, name)] for name in ("fp32-0", f"bf16-{stage}"))
    assert narrow == pytest.approx(wide[:STEPS_PER_EPOCH], rel=0.05)
