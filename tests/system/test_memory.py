"""The memory estimate is held against real runs: tensors under each ZeRO stage, and the process as a whole."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from scinet import fitting
from scinet.room import Room

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).parent / "worker_memory.py"
FINE_TUNED = ("data.cache_features=false", "model.freeze_image=false", "model.image_size=64")
CASES = ("0-fp32", "0-bf16", "1-bf16", "2-fp32", "3-fp32", "3-bf16")
# what a bucket is not filled with is not taken: here tensors are counted, so it is made as small as the weights
BUCKET = "deepspeed.zero_optimization.reduce_bucket_size=6000000"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, scenes: Path, launch: Any) -> dict[str, tuple[int, float]]:
    """Bytes that two ranks had and were estimated to have, by stage and precision."""
    out = tmp_path_factory.mktemp("memory")
    overrides = (f"data.path={scenes}", *FINE_TUNED, "train.global_batch_size=4", "fusion.bank_size=0", BUCKET)
    done = launch("torchrun", "--nproc-per-node", 2, WORKER, out, ",".join(CASES), *overrides, timeout_s=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, tuple[int, float]] = json.loads((out / "rows.json").read_text())
    return found


@pytest.mark.parametrize("case", CASES)
def test_state_of_the_weights_is_that_of_deepspeeds_tensors(rows: dict[str, tuple[int, float]], case: str) -> None:
    measured, estimated = rows[case]
    assert estimated == pytest.approx(measured, rel=0.1)


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
