"""Every ZeRO stage trains the same model on two ranks."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

WORKER = Path(__file__).parent / "worker_zero_stages.py"
TOLERANCE = 1e-5
STEPS = 3
Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, scenes: Path, launch: Any) -> Path:
    """What two ranks wrote under all configurations, in one launch."""
    out = tmp_path_factory.mktemp("zero")
    overrides = (
        f"data.path={scenes}",
        "data.cached_variants=2",
        "data.cache_features=true",
        "model.freeze_image=true",
        "model.image_size=64",
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


@pytest.mark.parametrize(("kind", "stage"), [("fp32", 1), ("fp32", 2), ("fp32", 3), ("accumulated", 2)])
def test_training_is_equal_when_only_the_stage_differs(folder: Path, rows: Rows, kind: str, stage: int) -> None:
    want, got = rows[f"{kind}-0"], rows[f"{kind}-{stage}"]
    assert len(want) == len(got) == STEPS
    for want_row, got_row in zip(want, got, strict=True):
        for name in ("loss/total", "loss/supervised", "loss/distillation", "gradient_norm", "learning_rate"):
            assert got_row[name] == pytest.approx(want_row[name], rel=TOLERANCE), name
    expected = load_file(str(folder / f"{kind}-0.safetensors"))
    state = load_file(str(folder / f"{kind}-{stage}.safetensors"))
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize(
    ("kind", "stage"),
    [*product(("fp32", "bf16"), range(4)), ("accumulated", 0), ("accumulated", 2)],
)
def test_losses_are_finite_and_weights_move(folder: Path, rows: Rows, kind: str, stage: int) -> None:
    steps = rows[f"{kind}-{stage}"]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert all(math.isfinite(row["loss/total"]) and row["loss/total"] > 0 for row in steps)
    assert all(math.isfinite(row["gradient_norm"]) and row["gradient_norm"] > 0 for row in steps)
    state = load_file(str(folder / f"{kind}-{stage}.safetensors"))
    moved = state["student.projection.weight"].float() - state["teacher.projection.weight"].float()
    assert moved.abs().max() > 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_stays_near_fp32(rows: Rows, stage: int) -> None:
    wide, narrow = ([row["loss/total"] for row in rows[name]] for name in ("fp32-0", f"bf16-{stage}"))
    assert narrow[:2] == pytest.approx(wide[:2], rel=0.05)
    # at stage 0 DeepSpeed takes an empty step first, which counts in AdamW's bias correction: the first update is 0.74
    # of what it is elsewhere, and the third step at this test's height of the learning rate is another
    if stage:
        assert narrow[2] == pytest.approx(wide[2], rel=0.1)
