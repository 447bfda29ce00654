"""CUB-200-2011: 312 binary attributes of birds, each annotated with a certainty."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scinet.data.archives import read_source
from scinet.data.records import Collection, ImageSource, Record
from scinet.data.source_tree import SourceTree
from scinet.errors import ConfigError, DataError

_CERTAINTIES = {1: "not visible", 2: "guessing", 3: "probably", 4: "definitely"}
_ARCHIVE = "CUB_200_2011.tgz"


@dataclass(frozen=True)
class CubOptions:
    """What is read of a CUB tree; attributes annotated with one of ``unknown_certainties`` count as not annotated."""

    source: Path
    unknown_certainties: tuple[int, ...] = ()


def collection(options: CubOptions, scratch: Path, skip_missing: bool) -> Collection:
    """Return CUB's official train and test split.

    Raises:
        ConfigError: if the source folder or a certainty does not exist.
        DataError: if a list is missing or not what it should be.
    """
    for certainty in options.unknown_certainties:
        if certainty not in _CERTAINTIES:
            choices = ", ".join(f"{number} {name}" for number, name in _CERTAINTIES.items())
            raise ConfigError(f"--certainty {certainty} is none of {choices}")
    tree = SourceTree(options.source, scratch)
    folders = ("", "CUB_200_2011/", "CUB_200_2011/attributes/", "attributes/")
    places = [f"{folder}attributes.txt" for folder in folders]
    names = _pairs(tree, tree.require("the list of attributes", *places, archive=_ARCHIVE))
    files = _pairs(tree, _require(tree, "the list of images", "images.txt"))
    is_train = _pairs(tree, _require(tree, "the split", "train_test_split.txt"))
    labels = _require(tree, "the attribute labels", "attributes/image_attribute_labels.txt")
    observed, notes = _read_labels(tree, labels, list(files), list(names), options)
    unlisted = next((image_id for image_id in files if is_train.get(image_id) not in ("0", "1")), None)
    if unlisted is not None:
        found = f"'{is_train[unlisted]}'" if unlisted in is_train else "nothing"
        raise DataError(f"train_test_split.txt says {found} of image {unlisted}, expected 1 (train) or 0 (test)")
    unknown = ", ".join(_CERTAINTIES[certainty] for certainty in options.unknown_certainties) or "none"
    source: dict[str, Any] = {
        "name": "Caltech-UCSD Birds-200-2011, attributes",
        "version": "2011, official split",
        "licence": "images may not be redistributed; for research and education only",
        "url": "https://www.vision.caltech.edu/datasets/cub_200_2011/",
        "traps": [
            f"certainties that count as not annotated: {unknown}; published tables use every label whatever its "
            "certainty, about 31.5 positives an image",
            "lines with surplus fields, which the official file has: their first four are used if they make sense",
        ],
        **notes,
        "options": {"unknown_certainties": list(options.unknown_certainties)},
    }

    def records() -> Iterator[Record]:
        for row, (image_id, file) in enumerate(files.items()):
            positives, negatives = (tuple(np.flatnonzero(observed[row] == sign).tolist()) for sign in (1, -1))
            split = "train" if is_train[image_id] == "1" else "test"
            image = tree.find(f"CUB_200_2011/images/{file}", f"images/{file}")
            yield Record(file.removesuffix(".jpg"), image, f"images/{file}", positives, negatives, split)

    return Collection("cub", list(names.values()), source, records, len(files), read_source)


def _require(tree: SourceTree, what: str, name: str) -> ImageSource:
    return tree.require(what, f"CUB_200_2011/{name}", name, archive=_ARCHIVE)


def _pairs(tree: SourceTree, file: ImageSource) -> dict[str, str]:
    """Return a list of ids and values."""
    pairs: dict[str, str] = {}
    for line in tree.lines(file):
        if line.strip():
            key, _, value = line.strip().partition(" ")
            if not value or key in pairs:
                raise DataError(f"{file}: '{line.strip()}' is no new id with a value")
            pairs[key] = value.strip()
    if not pairs:
        raise DataError(f"{file} is empty")
    return pairs


def _read_labels(
    tree: SourceTree, file: ImageSource, images: list[str], attributes: list[str], options: CubOptions
) -> tuple[npt.NDArray[np.int8], dict[str, int]]:
    """Return [N, C] int8 of +1, -1, 0, and counts for the card."""
    row, column = ({key: place for place, key in enumerate(keys)} for keys in (images, attributes))
    observed = np.zeros((len(images), len(attributes)), dtype=np.int8)
    has_line = np.zeros(observed.shape, dtype=np.bool_)
    surplus = unreadable = unsure = 0
    for number, line in enumerate(tree.lines(file), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) < 4 or words[0] not in row or words[1] not in column:
            raise DataError(f"{file} line {number}: '{line[:60]}' is not image, attribute, presence, certainty, time")
        cell = row[words[0]], column[words[1]]
        if has_line[cell]:
            raise DataError(f"{file} line {number}: image {words[0]} and attribute {words[1]} come a second time")
        has_line[cell] = True
        if words[2] not in ("0", "1") or words[3] not in ("1", "2", "3", "4"):
            unreadable += 1
            continue
        surplus += len(words) > 5
        if int(words[3]) in options.unknown_certainties:
            unsure += 1
            continue
        observed[cell] = 1 if words[2] == "1" else -1
    if not has_line.all():
        image, attribute = np.argwhere(~has_line)[0]
        raise DataError(
            f"{file} has no line for {(~has_line).sum()} of {has_line.size} labels, the first of image "
            f"{images[image]}, attribute {attributes[attribute]}: it is cut short"
        )
    return observed, {
        "lines_with_surplus_fields": surplus,
        "lines_without_a_label": unreadable,
        "labels_not_annotated_by_certainty": unsure,
    }
