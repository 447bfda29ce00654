"""Open Images V6: image labels that people verified, present and absent; all other cells are unknown."""

from __future__ import annotations

import contextlib
import csv
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scinet.data.archives import read_source
from scinet.data.records import Collection, ImageSource, Record
from scinet.data.source_tree import SourceTree
from scinet.errors import DataError, nearest

_SPLITS = {"train": "train", "holdout": "validation", "test": "test"}
_FOLDERS = ("", "annotations/", "labels/", "metadata/")
_HEADER = ["ImageID", "Source", "LabelName", "Confidence"]
_CONFIDENCES = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
_NUM_BUCKETS = 64


@dataclass(frozen=True)
class OpenImagesOptions:
    """What is read of an Open Images tree."""

    source: Path


def collection(options: OpenImagesOptions, scratch: Path, skip_missing: bool) -> Collection:
    """Return train, validation (as hold-out) and test over the trainable classes.

    Raises:
        ConfigError: if the source folder does not exist.
        DataError: if a list is missing or not what it should be.
    """
    tree = SourceTree(options.source, scratch)
    class_names, position = _classes(tree)
    lists = tree.split_files(
        {
            split: _candidates(
                f"{'oidv6-' if part == 'train' else ''}{part}-annotations-human-imagelabels.csv",
                f"{'' if part == 'train' else 'oidv6-'}{part}-annotations-human-imagelabels.csv",
            )
            for split, part in _SPLITS.items()
        },
        {split: f"a .csv.gz of that name (Open Images V6, {part})" for split, part in _SPLITS.items()},
        skip_missing=skip_missing,
    )
    counts: Counter[str] = Counter()
    buckets = {
        split: _sort_into_buckets(tree, file, position, scratch / f"rows-{split}", counts)
        for split, file in lists.items()
    }
    source: dict[str, Any] = {
        "name": "Open Images",
        "version": "V6, human-verified image labels: " + ", ".join(f"{_SPLITS[split]} as {split}" for split in lists),
        "licence": "annotations CC BY 4.0; images listed as CC BY 2.0",
        "url": "https://storage.googleapis.com/openimages/web/index.html",
        "traps": [
            "a verified 1 is present, a verified 0 absent, everything else unknown: never treat it as absent",
            "machine-generated labels are ignored",
            f"only the {len(class_names)} trainable classes count, in the order of their list",
            "the official validation split is the hold-out; nothing is taken from train",
            "a cell that was verified both ways is unknown",
        ],
        "absent_splits": sorted(set(_SPLITS) - set(lists)),
        "rows": dict(counts),
        "options": {},
    }

    def records() -> Iterator[Record]:
        contradictions = 0
        for split, files in buckets.items():
            for file in files:
                images, conflicts = _read_bucket(file)
                contradictions += conflicts
                for image_id, (positives, negatives) in sorted(images.items()):
                    image = tree.find(*_image_names(_SPLITS[split], image_id))
                    expected = _image_names(_SPLITS[split], image_id)[0]
                    yield Record(image_id, image, expected, tuple(positives), tuple(negatives), split)
        source["rows"]["cells_verified_both_ways"] = contradictions

    return Collection("openimages-v6", class_names, source, records, 0, read_source, holdout=0.0)


def _candidates(*names: str) -> tuple[str, ...]:
    return tuple(f"{folder}{name}{packed}" for name in names for folder in _FOLDERS for packed in ("", ".gz"))


def _image_names(part: str, image_id: str) -> tuple[str, ...]:
    plain = (f"{part}/{image_id}.jpg", f"images/{part}/{image_id}.jpg", f"{part}/data/{image_id}.jpg")
    shard = f"train_{image_id[:1]}/{image_id}.jpg"
    return (shard, *plain, f"images/{shard}") if part == "train" else plain


def _classes(tree: SourceTree) -> tuple[list[str], dict[str, int]]:
    """Return the class names and the class index of each trainable label."""
    names = _candidates("oidv6-classes-trainable.txt", "classes-trainable.txt")
    listed = tree.require("the list of trainable classes", *names)
    codes = [line.strip() for line in tree.lines(listed) if line.strip()]
    position = {code: place for place, code in enumerate(codes)}
    if len(position) != len(codes):
        raise DataError(f"{listed} names a class twice")
    file = tree.require(
        "the names of the classes", *_candidates("oidv6-class-descriptions.csv", "class-descriptions.csv")
    )
    described = {row[0]: row[1] for row in _rows(tree, file) if len(row) >= 2}
    nameless = next((code for code in codes if code not in described), None)
    if nameless is not None:
        raise DataError(f"{file} does not name the class {nameless}{nearest(nameless, described)}")
    shared = Counter(described[code] for code in codes)
    # some names are shared by several classes: their codes tell them apart
    return [described[c] if shared[described[c]] == 1 else f"{described[c]} ({c})" for c in codes], position


def _rows(tree: SourceTree, file: ImageSource) -> Iterator[list[str]]:
    try:
        yield from csv.reader(tree.lines(file))
    except csv.Error as error:
        raise DataError(f"{file} is not readable as CSV: {error}") from error


def _sort_into_buckets(
    tree: SourceTree, file: ImageSource, position: dict[str, int], folder: Path, counts: Counter[str]
) -> list[Path]:
    """Spread the rows of a label file over files, all rows of an image in one, each small enough for memory."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:02d}.txt" for number in range(_NUM_BUCKETS)]
    rows = _rows(tree, file)
    header = next(rows, [])
    if header[: len(_HEADER)] != _HEADER:
        raise DataError(f"{file} begins with '{','.join(header)[:80]}', expected {','.join(_HEADER)}")
    used_before = counts["used"]
    with contextlib.ExitStack() as stack:
        buckets = [stack.enter_context(path.open("w", encoding="utf-8")) for path in paths]
        for number, row in enumerate(rows, start=2):
            if not row:
                continue
            if len(row) < len(_HEADER):
                raise DataError(f"{file} line {number} has {len(row)} cells, the header has {len(header)}")
            image_id, made_by, code, confidence = row[:4]
            if not image_id.isalnum():
                raise DataError(f"{file} line {number}: image id {image_id[:60]!a} is not made of letters and digits")
            if "machine" in made_by:
                counts["ignored_from_machines"] += 1
            elif confidence not in _CONFIDENCES:
                raise DataError(f"{file} line {number}: confidence '{confidence}' of a verified label is not 0 or 1")
            elif code not in position:
                counts["ignored_of_other_classes"] += 1
            else:
                bucket = buckets[zlib.crc32(image_id.encode()) % _NUM_BUCKETS]
                bucket.write(f"{image_id}\t{position[code]}\t{_CONFIDENCES[confidence]}\n")
                counts["used"] += 1
    if counts["used"] == used_before:
        raise DataError(f"{file} holds no verified label of a trainable class")
    return paths


def _read_bucket(path: Path) -> tuple[dict[str, tuple[list[int], list[int]]], int]:
    """Return the known positives and negatives of each image, and how many cells were verified both ways."""
    found: dict[str, tuple[set[int], set[int]]] = {}
    with path.open(encoding="utf-8") as rows:
        for row in rows:
            image_id, label, value = row.rstrip("\n").split("\t")
            found.setdefault(image_id, (set(), set()))[value == "0"].add(int(label))
    conflicts = sum(len(positives & negatives) for positives, negatives in found.values())
    return {key: (sorted(p - n), sorted(n - p)) for key, (p, n) in found.items()}, conflicts
