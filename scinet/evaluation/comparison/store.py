"""Finished cells on the disk: figures as JSON, the raw test predictions beside them, the truth once a test set.

Everything gets its name when it is whole, a cell's JSON last: it makes the cell a finished one. Shapes: N images,
C classes, S resamples.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from scinet.errors import DataError
from scinet.rundir import exclusive, write_text

_LOCK, _SHARED_LOCK = ".cells.lock", ".shared.lock"
MOMENTS = ("selected", "last")
FUSED = "fused"
"""The selected teacher and its bank; not of every cell."""


@dataclass(frozen=True)
class Judgement:
    """One teacher's predictions in figures, percentages: what recomputing has to give again.

    Attributes:
        mean_average_precision: over the classes with a positive.
        class_f1: CF1, of the means of precision and recall over classes.
        overall_f1: OF1, of all cells together.
        per_class: average precision, None without a positive.
        resampled: [S] float64, mAP of each resample of the test images.
    """

    mean_average_precision: float
    class_f1: float
    overall_f1: float
    per_class: list[float | None]
    resampled: Tensor


@dataclass(frozen=True)
class Course:
    """What only the training itself can tell of a cell.

    Attributes:
        holdout: hold-out mAP of the selected epoch; None without training.
        best_epoch: that epoch, from 0.
        num_epochs: epochs trained.
        student: test mAP of the student at the last epoch.
        test_peak: highest test mAP of the teacher over the evaluated epochs; None where not asked for.
        seconds: for training and evaluation.
        world: where it ran: device, ranks, threads, versions.
    """

    holdout: float | None
    best_epoch: int | None
    num_epochs: int
    student: float
    test_peak: float | None
    seconds: float
    world: dict[str, Any]


@dataclass(frozen=True)
class Record:
    """A finished cell; its test set is known by a hash of the truth."""

    course: Course
    judgements: dict[str, Judgement]
    truth: str


@dataclass(frozen=True)
class TestSet:
    """Truth [N, C] int8 of a test split in its order, and what its columns mean."""

    __test__ = False  # pytest would collect it

    truth: Tensor
    class_names: tuple[str, ...]
    data_set: str

    @property
    def name(self) -> str:
        """Return a hash of its content."""
        digest = hashlib.sha256(json.dumps([list(self.truth.shape), self.class_names]).encode())
        digest.update(self.truth.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Finished:
    """A cell that has just been trained: its figures, and the predictions [N, C] float32 of each moment."""

    record: Record
    predictions: dict[str, Tensor]
    test_set: TestSet


class Store:
    """The folder of a comparison's cells; any number of processes may use it."""

    def __init__(self, folder: Path) -> None:
        """Name the folder, which need not exist yet."""
        self.folder = folder

    def find(self, key: str, *, test_peak: bool) -> Record | None:
        """Return a finished cell, or None if it has not run, is damaged, or lacks the peak that is asked for."""
        try:
            tree = json.loads(self._figures(key).read_text(encoding="utf-8"))
            with safe_open(str(self._predictions(key)), framework="pt") as file:
                resampled = {moment: file.get_tensor(f"{moment}_resampled") for moment in tree["judgements"]}
            judged = {
                moment: Judgement(**figures, resampled=resampled[moment])
                for moment, figures in tree["judgements"].items()
            }
            record = Record(Course(**tree["course"]), judged, tree["truth"])
            if not judged.keys() >= set(MOMENTS):
                return None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None
        is_whole = self._truth(record.truth).is_file() and (not test_peak or record.course.test_peak is not None)
        return record if is_whole else None

    def write(self, key: str, finished: Finished, described: dict[str, Any]) -> None:
        """Keep a finished cell, with what can change its result for whoever reads the file."""
        record = finished.record
        self._write_truth(finished.test_set)
        resampled = {f"{moment}_resampled": found.resampled for moment, found in record.judgements.items()}
        _write_tensors(self._predictions(key), finished.predictions | resampled)
        judged = {
            moment: {name: value for name, value in vars(found).items() if name != "resampled"}
            for moment, found in record.judgements.items()
        }
        tree = {"course": asdict(record.course), "judgements": judged, "truth": record.truth, "config": described}
        write_text(self._figures(key), json.dumps(tree, indent=1) + "\n")

    def predictions(self, key: str, moment: str) -> Tensor:
        """Return the raw test predictions [N, C] float32 of a cell.

        Raises:
            DataError: they are damaged.
        """
        path = self._predictions(key)
        try:
            with safe_open(str(path), framework="pt") as file:
                found: Tensor = file.get_tensor(moment)
        except (OSError, ValueError, SafetensorError) as error:
            raise DataError(f"{path} is damaged ({error}): remove it, and its cell runs anew") from error
        return found

    def test_set(self, name: str) -> TestSet:
        """Return a test set by its name.

        Raises:
            DataError: it is damaged.
        """
        path = self._truth(name)
        try:
            with safe_open(str(path), framework="pt") as file:
                described = file.metadata()
                found = TestSet(
                    file.get_tensor("truth"), tuple(json.loads(described["class_names"])), described["data_set"]
                )
            if found.name != name:
                raise ValueError("its content is not what its name says")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DataError(f"{path} is damaged ({error}): remove it, and its cells run anew") from error
        return found

    @contextlib.contextmanager
    def claimed(self, key: str) -> Iterator[bool]:
        """Say whether this process may train a cell now; the claim ends with the process, however that ends.

        A claim is a byte of one lock file, at a place that the key says, so no file a cell is left behind. A process
        makes one claim at a time: closing the file gives up all that it has.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(key[:15], 16))
                is_ours = True
            except OSError:
                is_ours = False
            yield is_ours
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process makes what all cells share."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with exclusive(self.folder / _SHARED_LOCK, "features are being made", patience_s=float("inf")):
            yield

    def _write_truth(self, test_set: TestSet) -> None:
        path = self._truth(test_set.name)
        if path.is_file():
            return
        with self.alone():
            described = {"class_names": json.dumps(test_set.class_names), "data_set": test_set.data_set}
            _write_tensors(path, {"truth": test_set.truth}, described)

    def _figures(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _predictions(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _truth(self, name: str) -> Path:
        return self.folder / f"truth-{name}.safetensors"


def _write_tensors(path: Path, tensors: dict[str, Tensor], described: dict[str, str] | None = None) -> None:
    temporary = path.with_name(f".{path.name}.part")
    # the library's own writer refuses tensors that share memory, and makes files that only their owner can read
    content = save({name: value.clone() for name, value in tensors.items()}, described)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
