"""1, 2 and 4 ranks with one global batch compute the same, in the same order."""

from __future__ import annotations

import json
import math
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

WORKER = Path(__file__).parent / "worker_world_size.py"
GAPS = ("short", "skipped")
SPOILT = ("skipped", "skipped-images", "accumulated", "whole-bce", "accumulated-bce")
MODES = {
    1: ("features", "images", *GAPS, "skipped-images", "accumulated", "whole-bce", "accumulated-bce"),
    2: ("features", "images", *GAPS, "skipped-images", "accumulated", "accumulated-bce"),
    4: ("features", "images", *GAPS, "accumulated"),
}
STEPS = {"features": 5, "images": 5, "short": 6, "skipped": 6, "skipped-images": 6, "accumulated": 6}
NUM_SPOILT = 2
TOLERANCE = 1e-5
OVERRIDES = (
    "data.cached_variants=2",
    "model.image_size=64",
    "train.global_batch_size=16",
    "train.precision=fp32",
    "train.log_every_steps=1",
    "loss.warmup_fraction=0",
)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """The data set with two training images that cannot be decoded, in the first and in the last shard."""
    folder = Path(shutil.copytree(scenes, tmp_path_factory.mktemp("spoilt") / "scenes"))
    for shard in ("train-000000.tar", "train-000002.tar"):
        with tarfile.open(folder / shard) as tar:
            member = next(member for member in list(tar)[6:] if member.name.endswith(".jpg"))
        with (folder / shard).open("r+b") as file:
            file.seek(member.offset_data)
            file.write(bytes(member.size))
    # another card, or the cached features of the sound copy would do
    card = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(card | {"name": "spoilt"}))
    return folder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, scenes: Path, spoilt: Path, launch: Any) -> dict[int, Path]:
    """Folders of what each world size wrote."""
    own = [f"{mode}:data.path={spoilt}" for mode in SPOILT]
    folders = {}
    for size, modes in MODES.items():
        folders[size] = tmp_path_factory.mktemp(f"ranks-{size}")
        arguments = (folders[size], ",".join(modes), f"data.path={scenes}", *own, *OVERRIDES)
        done = launch("torchrun", "--nproc-per-node", size, WORKER, *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
    return folders


def _read(folder: Path, mode: str, rank: int) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = json.loads((folder / f"{mode}-{rank}.json").read_text())
    return load_file(str(folder / f"{mode}-{rank}.safetensors")), rows


def _compare(got: dict[str, Tensor], want: dict[str, Tensor], prefixes: tuple[str, ...], tolerance: float) -> None:
    names = [name for name in want if name.startswith(prefixes)]
    assert names
    assert [name for name in got if name.startswith(prefixes)] == names
    for name in names:
        torch.testing.assert_close(
            got[name],
            want[name],
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize(("size", "mode"), [(size, mode) for size in (2, 4) for mode in MODES[size] if mode in STEPS])
def test_steps_are_equal_when_only_the_number_of_ranks_differs(recorded: dict[int, Path], size: int, mode: str) -> None:
    want, want_rows = _read(recorded[1], mode, 0)
    assert len(want_rows) == STEPS[mode]
    for rank in range(size):
        got, rows = _read(recorded[size], mode, rank)
        assert [row["ids"] for row in rows] == [row["ids"] for row in want_rows]
        for row, want_row in zip(rows, want_rows, strict=True):
            for name in want_row.keys() - {"ids"}:
                assert row[name] == pytest.approx(want_row[name], rel=TOLERANCE, abs=TOLERANCE), name
        _compare(got, want, ("start.",), 1e-6)  # the bias: one bisection over differently batched logits
        _compare(got, want, tuple(f"{step}." for step in range(STEPS[mode])), TOLERANCE)
        _compare(got, want, ("end.",), TOLERANCE)


@pytest.mark.parametrize(("size", "mode"), [(size, mode) for size in (2, 4) for mode in MODES[size] if mode in STEPS])
def test_gradients_are_equal_when_only_the_number_of_ranks_differs(
    recorded: dict[int, Path], size: int, mode: str
) -> None:
    want, got = _read(recorded[1], mode, 0)[0], _read(recorded[size], mode, size - 1)[0]
    names = [name for name in want if name.startswith("gradient.")]
    assert any("prompter" in name for name in names)
    for name in names:
        difference = torch.linalg.vector_norm(got[name] - want[name])
        assert difference <= TOLERANCE * torch.linalg.vector_norm(want[name]), name


@pytest.mark.parametrize("mode", ["features", "images"])
def test_recorded_steps_exercise_the_whole_method(recorded: dict[int, Path], mode: str) -> None:
    tensors, rows = _read(recorded[1], mode, 0)
    assert all(row["consistency_weak"] > 0 and row["distillation"] > 0 for row in rows)
    assert all(row["gradient_norm"] > 0 for row in rows)
    assert len({name for row in rows for name in row["ids"]}) == 80  # no sample twice in an epoch
    assert len(tensors["4.bank.indices"]) == 80
    assert not torch.equal(tensors["0.thresholds"], tensors["4.thresholds"])
    moved = tensors["start.student/weight/prompter.context"] - tensors["end.student/weight/prompter.context"]
    assert moved.abs().max() > 0


def test_teacher_is_equal_to_the_student_at_the_start(recorded: dict[int, Path]) -> None:
    tensors, _ = _read(recorded[1], "features", 0)
    names = [name.removeprefix("start.teacher/") for name in tensors if name.startswith("start.teacher/")]
    assert names
    assert all(torch.equal(tensors[f"start.student/{name}"], tensors[f"start.teacher/{name}"]) for name in names)


@pytest.mark.parametrize(("mode", "num_bad"), [("short", 0), ("skipped", NUM_SPOILT), ("skipped-images", NUM_SPOILT)])
def test_every_readable_sample_is_trained_once_when_the_last_batch_is_short(
    recorded: dict[int, Path], scenes: Path, mode: str, num_bad: int
) -> None:
    tensors, rows = _read(recorded[1], mode, 0)
    number = json.loads((scenes / "dataset.json").read_text())["splits"]["train"]["num_samples"]
    assert number % 16, "the test wants a rest"
    ids = [name for row in rows for name in row["ids"]]
    assert ids.count("") == 6 * 16 - number + num_bad
    assert len(set(ids) - {""}) == number - num_bad
    assert len(tensors["5.bank.indices"]) == number - num_bad
    assert (tensors["5.bank.indices"] >= 0).all()
    assert all(math.isfinite(value) for row in rows for value in (row["loss"], row["gradient_norm"]))
    assert int(tensors["end.thresholds/place"][1]) == number - num_bad


def test_baseline_is_equal_when_a_batch_with_gaps_is_accumulated(recorded: dict[int, Path]) -> None:
    want, want_rows = _read(recorded[1], "whole-bce", 0)
    for size in (1, 2):
        got, rows = _read(recorded[size], "accumulated-bce", 0)
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in want_rows], rel=TOLERANCE)
        _compare(got, want, ("end.student/",), TOLERANCE)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_training_is_equal_when_only_the_accumulation_differs(recorded: dict[int, Path], size: int) -> None:
    want, want_rows = _read(recorded[1], "skipped", 0)
    got, rows = _read(recorded[size], "accumulated", 0)
    assert [row["ids"] for row in rows] == [row["ids"] for row in want_rows]
    for name in want_rows[0].keys() - {"ids"}:
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in want_rows], rel=TOLERANCE), name
    _compare(got, want, tuple(f"{step}." for step in range(6)), TOLERANCE)
    _compare(got, want, ("end.",), TOLERANCE)
