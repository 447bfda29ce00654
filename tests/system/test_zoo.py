"""The zoo's methods and heads do not depend on ranks, accumulation or a break, what they remember included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow, pytest.mark.timeout(1800)]

WORKER = Path(__file__).parent / "worker_zoo.py"
# every method with a memory, every one that looks at the global batch, and one that does neither
METHODS = ("em", "em_apl", "epr", "role", "ll_r", "ll_cp", "p_asl", "vlpl", "scpnet")
HEADS = (
    "scinet:regions",
    "bce:linear",
    "bce:regions",
    "bce:cam",
    "bce:ml_decoder",
    "bce:dualcoop",
    "dualcoop:dualcoop",
    "vlpl:cam",
)
TABLES = {"em_apl": "targets", "role": "updates", "ll_cp": "corrected", "p_asl": "sum", "scpnet": "ring"}
OVERRIDES = (
    "data.cache_features=true",
    "data.cached_variants=2",
    "model.freeze_image=true",
    "model.image_size=64",
    "train.global_batch_size=16",
    "train.epochs=3",
    "train.precision=fp32",
    "train.log_every_steps=1",
    "loss.warmup_fraction=0.4",
    "zoo.large_loss.percent=1",
    "zoo.selective.ignored=1",
    "zoo.entropy.start=0.4",
)
WAYS = {"alone": (1, 1), "two ranks": (2, 1), "accumulated": (1, 2)}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, scenes: Path, launch: Any) -> dict[str, Path]:
    """Folders of what each way of cutting the global batch led to."""
    folders = {}
    for way, (size, accumulation) in WAYS.items():
        folders[way] = tmp_path_factory.mktemp("zoo")
        own = (f"data.path={scenes}", f"train.accumulation_steps={accumulation}", *OVERRIDES)
        names = ",".join(METHODS + HEADS)
        done = launch("torchrun", "--nproc-per-node", size, WORKER, folders[way], names, *own, timeout_s=600)
        assert done.returncode == 0, done.stderr[-3000:]
    return folders


@pytest.mark.parametrize("method", METHODS + HEADS)
@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_method_is_equal_when_the_global_batch_is_cut(ended: dict[str, Path], way: str, method: str) -> None:
    want, got = (load_file(str(ended[name] / f"{method}.safetensors")) for name in ("alone", way))
    rows, want_rows = (json.loads((ended[name] / f"{method}.json").read_text())["rows"] for name in (way, "alone"))
    assert [row["loss/total"] for row in rows] == pytest.approx([row["loss/total"] for row in want_rows], rel=1e-4)
    names = [name for name in want if name.startswith(("student/weight", "teacher", "zoo/"))]
    assert names
    for name in names:
        assert_close(got[name], want[name], rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("method", METHODS + HEADS)
@pytest.mark.parametrize("way", WAYS)
def test_method_goes_on_bit_for_bit_when_it_was_broken_off(ended: dict[str, Path], way: str, method: str) -> None:
    assert json.loads((ended[way] / f"{method}.json").read_text())["differing"] == []


@pytest.mark.parametrize("method", TABLES)
def test_memory_is_used(ended: dict[str, Path], method: str) -> None:
    table = load_file(str(ended["alone"] / f"{method}.safetensors"))[f"zoo/{TABLES[method]}"]
    assert table.nan_to_num().bool().any()
