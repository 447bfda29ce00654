"""1, 2 and 4 ranks with one global batch compute the same, in the same order."""

from __future__ import annotations

import functools
import json
import math
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scinet import config, materials
from scinet.data.batch import Batch
from scinet.distributed import Ranks, gather_objects, gather_rows, sum_over_ranks
from scinet.objective import Objective, Step
from scinet.telemetry import MetricsLog, Silence
from scinet.trainer import Trainer
from tests import ranks as forked

pytestmark = pytest.mark.multiprocess

Recorded = tuple[dict[str, Tensor], list[dict[str, Any]]]
Record = Callable[[int, str], list[Recorded]]
GAPS = ("short", "skipped")
SPOILT = ("skipped", "skipped-images", "accumulated", "whole-bce", "accumulated-bce")
# each mode at some other number of ranks, and each number of ranks with some modes; the rest is nightly's
CASES = (
    (2, "features"),
    (2, "images"),
    (2, "skipped-images"),
    (4, "short"),
    (4, "skipped"),
    *(
        pytest.param(size, mode, marks=pytest.mark.nightly)
        for size, mode in (
            (2, "short"),
            (2, "skipped"),
            (2, "accumulated"),
            (4, "features"),
            (4, "images"),
            (4, "accumulated"),
        )
    ),
)
STEPS = {"features": 5, "images": 5, "short": 6, "skipped": 6, "skipped-images": 6, "accumulated": 6}
NUM_SPOILT = 2
TOLERANCE = 1e-5
OVERRIDES = (
    "model.backbone=debug",
    "data.cached_variants=2",
    "model.image_size=64",
    "train.global_batch_size=16",
    "train.precision=fp32",
    "train.log_every_steps=1",
    "loss.warmup_fraction=0",
)


# Features: five steps are the whole run, over the peak of the learning rate. Images: the first five of a longer run;
# at its peak AdamW makes the rounding of a whole tower's tiny gradients into visible steps within five of them.
FEATURES = ("model.freeze_image=true", "data.cache_features=true", "train.epochs=1")
IMAGES = ("model.freeze_image=false", "data.cache_features=false", "train.epochs=20")
GAPS = ("train.last_batch=train", "data.on_bad_sample=skip", "data.max_bad_fraction=0.1")
OPTIONS = {
    "features": FEATURES,
    "images": IMAGES,
    "short": (*FEATURES, "train.last_batch=train"),
    "skipped": (*FEATURES, *GAPS),
    "skipped-images": (*IMAGES, *GAPS),
    "whole-bce": (*FEATURES, *GAPS, "method=bce"),
    "accumulated": (*FEATURES, *GAPS, "train.accumulation_steps=2"),
    "accumulated-bce": (*FEATURES, *GAPS, "method=bce", "train.accumulation_steps=2"),
}


class Recorder(Trainer):
    """A trainer that keeps what each step computed, for the global batch."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._seen_by = arguments[2]
        self.tensors: dict[str, Tensor] = {}
        self.rows: list[dict[str, Any]] = []

    def train_step(self, micro: list[Batch], num_valid: int) -> list[Step]:
        ranks: Ranks = self._seen_by
        number = len(self.rows)
        steps = super().train_step(micro, num_valid)
        ids = [name for batch in micro for name in gather_objects(list(batch.ids), ranks)]
        row: dict[str, Any] = {"ids": ids, "gradient_norm": self.engine.gradient_norm()}
        for name in ("loss", *steps[0].parts):
            values = [step.loss.detach() if name == "loss" else step.parts[name] for step in steps]
            row[name] = float(sum_over_ranks(torch.stack(values).mean(), ranks))
        self.rows.append(row)
        if number == 0:
            # AdamW's first moments of the first step are its gradients, element by element, times a constant
            self.tensors |= {name: value for name, value in _state(self, "gradient").items() if "/exp_avg/" in name}
        if not isinstance(self._aim, Objective):
            return steps
        unified = [step.confidence.unified.detach() for step in steps if step.confidence is not None]
        valid = torch.cat([gather_rows(batch.valid, ranks) for batch in micro])
        fusion = self._aim.fusion
        bank = fusion.bank.rows()
        self.tensors |= {
            f"{number}.confidence": torch.cat([gather_rows(rows, ranks) for rows in unified])[valid],
            f"{number}.thresholds": self._aim.thresholds.thresholds(),
            f"{number}.correlation": fusion.correlation.shrunk(),
            f"{number}.bank.embeddings": bank.embeddings.clone(),
            f"{number}.bank.observed": bank.observed.clone(),
            f"{number}.bank.indices": bank.indices.clone(),
        }
        return steps


def _state(trainer: Trainer, moment: str) -> dict[str, Tensor]:
    """Return all that a trainer keeps."""
    return {f"{moment}.{part.name}": part.read().view(part.shape).clone() for part in trainer.state().parts}


def _train(ranks: Ranks, mode: str, path: str) -> Recorded:
    """Train an epoch, as one rank, and return what must not depend on the number of ranks."""
    options = config.load(None, [*OVERRIDES, f"data.path={path}", *OPTIONS[mode]])
    made = materials.gather(options, ranks, lambda *_: None)
    trainer = Recorder(options, made, ranks, MetricsLog(None), Silence())
    start = _state(trainer, "start")
    trainer.train_epoch()
    return start | trainer.tensors | _state(trainer, "end"), trainer.rows


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
def recorded(scenes: Path, spoilt: Path) -> Record:
    """``recorded(size, mode)``: what each rank computed."""

    @functools.cache
    def record(size: int, mode: str) -> list[Recorded]:
        return forked.run(_train, mode, str(spoilt if mode in SPOILT else scenes), size=size)

    return record


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


@pytest.mark.parametrize(("size", "mode"), CASES)
def test_steps_are_equal_when_only_the_number_of_ranks_differs(recorded: Record, size: int, mode: str) -> None:
    want, want_rows = recorded(1, mode)[0]
    assert len(want_rows) == STEPS[mode]
    for rank in range(size):
        got, rows = recorded(size, mode)[rank]
        assert [row["ids"] for row in rows] == [row["ids"] for row in want_rows]
        for row, want_row in zip(rows, want_rows, strict=True):
            for name in want_row.keys() - {"ids"}:
                assert row[name] == pytest.approx(want_row[name], rel=TOLERANCE, abs=TOLERANCE), name
        _compare(got, want, ("start.",), 1e-6)  # the bias: one bisection over differently batched logits
        _compare(got, want, tuple(f"{step}." for step in range(STEPS[mode])), TOLERANCE)
        _compare(got, want, ("end.",), TOLERANCE)


@pytest.mark.parametrize(("size", "mode"), CASES)
def test_gradients_are_equal_when_only_the_number_of_ranks_differs(recorded: Record, size: int, mode: str) -> None:
    want, got = recorded(1, mode)[0][0], recorded(size, mode)[size - 1][0]
    names = [name for name in want if name.startswith("gradient.")]
    assert any("prompter" in name for name in names)
    for name in names:
        difference = torch.linalg.vector_norm(got[name] - want[name])
        assert difference <= TOLERANCE * torch.linalg.vector_norm(want[name]), name


@pytest.mark.parametrize("mode", ["features", "images"])
def test_recorded_steps_exercise_the_whole_method(recorded: Record, mode: str) -> None:
    tensors, rows = recorded(1, mode)[0]
    assert all(row["consistency_weak"] > 0 and row["distillation"] > 0 for row in rows)
    assert all(row["gradient_norm"] > 0 for row in rows)
    assert len({name for row in rows for name in row["ids"]}) == 80  # no sample twice in an epoch
    assert len(tensors["4.bank.indices"]) == 80
    assert not torch.equal(tensors["0.thresholds"], tensors["4.thresholds"])
    moved = tensors["start.student/weight/prompter.context"] - tensors["end.student/weight/prompter.context"]
    assert moved.abs().max() > 0


def test_teacher_is_equal_to_the_student_at_the_start(recorded: Record) -> None:
    tensors, _ = recorded(1, "features")[0]
    names = [name.removeprefix("start.teacher/") for name in tensors if name.startswith("start.teacher/")]
    assert names
    assert all(torch.equal(tensors[f"start.student/{name}"], tensors[f"start.teacher/{name}"]) for name in names)


@pytest.mark.parametrize(("mode", "num_bad"), [("short", 0), ("skipped", NUM_SPOILT), ("skipped-images", NUM_SPOILT)])
def test_every_readable_sample_is_trained_once_when_the_last_batch_is_short(
    recorded: Record, scenes: Path, mode: str, num_bad: int
) -> None:
    tensors, rows = recorded(1, mode)[0]
    number = json.loads((scenes / "dataset.json").read_text())["splits"]["train"]["num_samples"]
    assert number % 16, "the test wants a rest"
    ids = [name for row in rows for name in row["ids"]]
    assert ids.count("") == 6 * 16 - number + num_bad
    assert len(set(ids) - {""}) == number - num_bad
    assert len(tensors["5.bank.indices"]) == number - num_bad
    assert (tensors["5.bank.indices"] >= 0).all()
    assert all(math.isfinite(value) for row in rows for value in (row["loss"], row["gradient_norm"]))
    assert int(tensors["end.thresholds/place"][1]) == number - num_bad


def test_baseline_is_equal_when_a_batch_with_gaps_is_accumulated(
    recorded: Record,
) -> None:
    want, want_rows = recorded(1, "whole-bce")[0]
    for size in (1, 2):
        got, rows = recorded(size, "accumulated-bce")[0]
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in want_rows], rel=TOLERANCE)
        _compare(got, want, ("end.student/",), TOLERANCE)


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.nightly), 4])
def test_training_is_equal_when_only_the_accumulation_differs(recorded: Record, size: int) -> None:
    want, want_rows = recorded(1, "skipped")[0]
    got, rows = recorded(size, "accumulated")[0]
    assert [row["ids"] for row in rows] == [row["ids"] for row in want_rows]
    for name in want_rows[0].keys() - {"ids"}:
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in want_rows], rel=TOLERANCE), name
    _compare(got, want, tuple(f"{step}." for step in range(6)), TOLERANCE)
    _compare(got, want, ("end.",), TOLERANCE)
