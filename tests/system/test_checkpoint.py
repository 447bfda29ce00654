"""A checkpoint goes on bit-equal at its layout, and equal to rounding at any other number of ranks and ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

WORKER = Path(__file__).parent / "worker_checkpoint.py"
# launches: number of ranks, layouts that are saved, checkpoints and the layouts that go on from them
LAUNCHES: tuple[tuple[int, tuple[str, ...], tuple[tuple[str, str], ...]], ...] = (
    (
        2,
        ("fp32-0", "fp32-2", "bf16-0"),
        (
            ("fp32-0", "fp32-0"),
            ("fp32-2", "fp32-2"),
            ("bf16-0", "bf16-0"),
            ("fp32-0", "fp32-2-offload"),
            ("fp32-2", "fp32-0"),
        ),
    ),
    (
        2,
        ("fp32-3", "bf16-3"),
        (
            ("fp32-3", "fp32-3"),
            ("bf16-3", "bf16-3"),
            ("fp32-0", "fp32-3"),
            ("fp32-2", "fp32-3-offload"),
            ("bf16-0", "bf16-3"),
        ),
    ),
    (1, (), (("fp32-3", "fp32-0"), ("fp32-2", "fp32-1"), ("fp32-0", "fp32-3"))),
    (3, (), (("fp32-0", "fp32-2"), ("fp32-3", "fp32-1"), ("fp32-2", "fp32-3"))),
)
PAIRS = [(saved, size, layout) for size, _, pairs in LAUNCHES for saved, layout in pairs]
SAME = [saved for saved, size, layout in PAIRS if size == 2 and saved == layout]
OTHER = [(saved, size, layout) for saved, size, layout in PAIRS if size != 2 or saved != layout]
CLOCKS = {"samples_per_second", "data_wait_share"}
MIDDLE, END = 4, 8
FIGURES = ("loss/total", "loss/supervised", "loss/distillation", "gradient_norm", "learning_rate", "samples_seen")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, on_features: tuple[str, ...], launch: Any) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    words = (
        *on_features,
        "train.global_batch_size=12",
        f"train.max_steps={END}",
        "train.epochs=2",
        "train.log_every_steps=1",
        "loss.warmup_fraction=0",
    )
    for size, saving, pairs in LAUNCHES:
        loading = ",".join(f"2x{saved}:{layout}" for saved, layout in pairs)
        done = launch("torchrun", "--nproc-per-node", size, WORKER, folder, ",".join(saving), loading, *words)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = [{k: v for k, v in row.items() if k not in CLOCKS} for row in json.loads(path.read_text())]
    assert [row["step"] for row in rows][-4:] == list(range(MIDDLE + 1, END + 1))
    return rows[-4:]


@pytest.mark.parametrize("layout", SAME)
def test_training_goes_on_bit_equal_at_the_same_layout(out: Path, layout: str) -> None:
    name = f"2x{layout}"
    assert _rows(out / f"{name}-to-{name}.json") == _rows(out / f"{name}.json")
    got, want = load_file(str(out / f"{name}-to-{name}.safetensors")), load_file(str(out / f"{name}.safetensors"))
    assert got.keys() == want.keys()
    assert [key for key in want if not torch.equal(got[key].nan_to_num(7.0), want[key].nan_to_num(7.0))] == []


@pytest.mark.parametrize(("saved", "size", "layout"), OTHER)
def test_training_goes_on_equal_at_another_layout(out: Path, saved: str, size: int, layout: str) -> None:
    tolerance = 1e-5 if saved.startswith("fp32") else 1e-3
    for row, want in zip(
        _rows(out / f"2x{saved}-to-{size}x{layout}.json"), _rows(out / f"2x{saved}.json"), strict=True
    ):
        for name in FIGURES:
            assert row[name] == pytest.approx(want[name], rel=tolerance), name
    got = load_file(str(out / f"2x{saved}-to-{size}x{layout}.safetensors"))
    for name, value in load_file(str(out / f"2x{saved}.safetensors")).items():
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)
