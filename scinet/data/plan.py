"""The plan of a build: every sample's place, settled on disk before the first shard is written.

One pass over the records gives each image that exists its ``index`` and its shard; images that do not exist are listed.
Only eight bytes a sample stay in memory.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from scinet.data.card import SPLITS
from scinet.data.masks import text_key, uniform
from scinet.data.records import Collection, Progress, Record
from scinet.errors import DataError
from scinet.texttable import is_unicode

MISSING_NAME = "missing.txt"
_NUM_NAMED = 3
_ESCAPES = {ord(mark): ascii(mark)[1:-1] for mark in "\t\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"}
_RECORDS_BETWEEN_REPORTS = 1000


@dataclass(frozen=True)
class PlannedShard:
    """The lines of a plan file that are one shard."""

    split: str
    number: int
    offset: int
    length: int
    num_samples: int
    digest: str

    @property
    def file(self) -> str:
        """Its name."""
        return f"{self.split}-{self.number:06d}.tar"


@dataclass(frozen=True)
class Plan:
    """What is to be written.

    Args:
        folder: holds ``plan-SPLIT.jsonl`` and ``missing.txt``.
        shards: in the order of the splits.
        num_indices: images that exist; their indices are 0 .. num_indices - 1.
        num_records: all that the collection lists.
        first_missing: names of the first missing images.
    """

    folder: Path
    shards: tuple[PlannedShard, ...]
    num_indices: int
    num_records: int
    first_missing: tuple[str, ...]

    @property
    def num_missing(self) -> int:
        """Images that the collection lists and that are not there."""
        return self.num_records - self.num_indices

    def file(self, split: str) -> Path:
        """Return the plan file of a split."""
        return self.folder / f"plan-{split}.jsonl"


class _SplitPlan:
    """The plan file of one split and the shard that its last lines will be."""

    def __init__(self, file: BinaryIO, split: str, shard_samples: int) -> None:
        self._file, self._split, self._shard_samples = file, split, shard_samples
        self.shards: list[PlannedShard] = []
        self._start = self._end = self._num_samples = 0
        self._digest = hashlib.sha256()

    def add(self, line: bytes) -> None:
        self._file.write(line)
        self._digest.update(line)
        self._end += len(line)
        self._num_samples += 1
        if self._num_samples == self._shard_samples:
            self.close_shard()

    def close_shard(self) -> None:
        if self._num_samples:
            length = self._end - self._start
            self.shards.append(
                PlannedShard(
                    self._split, len(self.shards), self._start, length, self._num_samples, self._digest.hexdigest()
                )
            )
        self._start, self._num_samples, self._digest = self._end, 0, hashlib.sha256()


def make_plan(collection: Collection, folder: Path, *, holdout: float, shard_samples: int, progress: Progress) -> Plan:
    """Go once through the records and write the plan.

    Args:
        collection: what to plan.
        folder: where the plan's files go.
        holdout: share of the training samples that are set aside for model selection, by a hash of their id.
        shard_samples: samples a shard.
        progress: told now and then.

    Raises:
        DataError: if an id comes twice, no sample comes at all, or none has its image.
    """
    keys = array.array("Q")
    index = 0
    first_missing: list[str] = []
    with contextlib.ExitStack() as stack:
        missing = stack.enter_context((folder / MISSING_NAME).open("w", encoding="utf-8", errors="replace"))
        splits = {
            split: _SplitPlan(stack.enter_context((folder / f"plan-{split}.jsonl").open("wb")), split, shard_samples)
            for split in SPLITS
        }
        for record in collection.records():
            keys.append(_key(record.sample_id))
            if record.image is None:
                missing.write(missing_line(record.sample_id, record.expected, "not found"))
                if len(first_missing) < _NUM_NAMED:
                    first_missing.append(record.expected)
            else:
                splits[_split(record, holdout)].add(_line(record, index))
                index += 1
            if len(keys) % _RECORDS_BETWEEN_REPORTS == 0:
                progress("listed", len(keys), max(collection.num_records, len(keys) + 1))
        progress("listed", len(keys), len(keys))
        for split in splits.values():
            split.close_shard()
    _check_unique(keys, collection)
    if not keys:
        raise DataError("the source holds no sample: nothing was written")
    shards = tuple(shard for split in splits.values() for shard in split.shards)
    return Plan(folder, shards, index, len(keys), tuple(first_missing))


def missing_line(sample_id: str, where: str, reason: str) -> str:
    """Return a line of ``missing.txt``: id, where the image should be, why it is not there."""
    return "\t".join(part.translate(_ESCAPES) for part in (sample_id, where, reason)) + "\n"


def _key(sample_id: str) -> int:
    if not is_unicode(sample_id):
        raise DataError(f"sample id {sample_id!a} holds half a character: it is no Unicode text")
    return text_key(sample_id)


def _split(record: Record, holdout: float) -> str:
    if record.split == "train" and holdout and uniform(f"holdout/{record.sample_id}") < holdout:
        return "holdout"
    return record.split


def _line(record: Record, index: int) -> bytes:
    positives, negatives = sorted(record.positives), sorted(record.negatives)
    entry = [record.sample_id, index, record.image, positives, negatives]
    return json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _check_unique(keys: array.array[int], collection: Collection) -> None:
    """Name an id that occurs twice; equal hashes of different ids, which are next to impossible, pass."""
    ordered = np.sort(np.array(keys, dtype=np.uint64))
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not suspects:
        return
    seen: dict[str, str] = {}
    for record in collection.records():
        if text_key(record.sample_id) in suspects:
            place = f"{record.split}: {record.image or record.expected}"
            if record.sample_id in seen:
                both = f"{seen[record.sample_id]}; {place}"
                raise DataError(f"sample id '{record.sample_id}' occurs twice ({both}); ids must be unique")
            seen[record.sample_id] = place
