"""NUS-WIDE: 81 concepts in one text list a concept, images by the paths of an image list."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scinet.data.archives import read_source
from scinet.data.records import Collection, Record
from scinet.data.source_tree import SourceTree
from scinet.errors import DataError

VERSIONS = {
    "cole": "rows without any concept are kept as all absent; published as 150,000/60,260 images, 22 % of them empty "
    "(Cole et al. and most single-positive tables)",
    "asl": "rows without any concept are left out; published as 119,103/50,720 images (ASL, SPLC, SCPNet, HSPNet)",
}
NUM_CONCEPTS = 81
_SPLITS = {"train": "Train", "test": "Test"}
_IMAGE_FOLDERS = ("Flickr/", "images/", "Images/", "")


@dataclass(frozen=True)
class NusWideOptions:
    """What is read of a NUS-WIDE tree; ``version`` is cole or asl."""

    source: Path
    version: str


def collection(options: NusWideOptions, scratch: Path, skip_missing: bool) -> Collection:
    """Return NUS-WIDE by its official train and test lists.

    Raises:
        ConfigError: if the source folder does not exist.
        DataError: if a list is missing or lists do not fit each other.
    """
    tree = SourceTree(options.source, scratch)
    concepts = _lines(tree, "the list of concepts", "Concepts81.txt", ("ConceptsList/",), "ConceptsList.zip")
    if len(concepts) != NUM_CONCEPTS:
        raise DataError(f"the list of concepts, Concepts81.txt, names {len(concepts)}, expected {NUM_CONCEPTS}")
    repeated = next((name for name in concepts if concepts.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f"the list of concepts names '{repeated}' twice")
    paths, labels = {}, {}
    for split, part in _SPLITS.items():
        listed = _lines(tree, f"the list of {split} images", f"{part}Imagelist.txt", ("ImageList/",), "ImageList.zip")
        paths[split] = [line.replace("\\", "/") for line in listed]
        if not listed:
            raise DataError(f"{part}Imagelist.txt lists no image")
        labels[split] = _labels(tree, concepts, part, len(listed))
    if any(found is None for found in labels.values()):
        labels = _from_all_labels(tree, concepts, paths)
    empty = {split: int((~found.any(axis=1)).sum()) for split, found in labels.items() if found is not None}
    keeps_empty = options.version == "cole"
    source: dict[str, Any] = {
        "name": "NUS-WIDE",
        "version": f"{options.version}: {VERSIONS[options.version]}",
        "licence": "images under Flickr's terms of use; lists for research",
        "url": "https://lms.comp.nus.edu.sg/wp-content/uploads/2019/research/nuswide/NUS-WIDE.html",
        "traps": [
            f"version {options.version}: {VERSIONS[options.version]}; results of the two are not comparable",
            "splits are the official Train and Test lists; both published versions hold the images that were reachable "
            "at their time, split anew, so their counts differ from these",
            "many Flickr links are dead: images that are missing are counted and listed",
        ],
        "official_rows": {split: len(listed) for split, listed in paths.items()},
        "rows_without_a_concept": empty,
        "options": {"version": options.version},
    }

    def records() -> Iterator[Record]:
        for split, listed in paths.items():
            found = labels[split]
            assert found is not None
            for path, row in zip(listed, found, strict=True):
                if keeps_empty or row.any():
                    positives, negatives = (tuple(np.flatnonzero(row == value).tolist()) for value in (1, 0))
                    # mirrors hold the images by folder, or all in one
                    flat = path.rpartition("/")[2]
                    image = tree.find(*(folder + path for folder in _IMAGE_FOLDERS), f"images/{flat}", f"Flickr/{flat}")
                    yield Record(path.removesuffix(".jpg"), image, f"Flickr/{path}", positives, negatives, split)

    num_records = sum(map(len, paths.values())) - (0 if keeps_empty else sum(empty.values()))
    return Collection(f"nuswide-{options.version}", concepts, source, records, num_records, read_source)


def _lines(tree: SourceTree, what: str, name: str, folders: tuple[str, ...], archive: str) -> list[str]:
    file = tree.require(what, *(folder + name for folder in (*folders, "")), archive=archive)
    return [line.strip() for line in tree.lines(file) if line.strip()]


def _labels(tree: SourceTree, concepts: list[str], part: str, num_rows: int) -> npt.NDArray[np.int8] | None:
    """Return [N, 81] int8 of 0 and 1 out of ``TrainTestLabels``, None if that folder is not there."""
    names = [f"TrainTestLabels/Labels_{concept}_{part}.txt" for concept in concepts]
    if all(tree.find(f"Groundtruth/{name}", name) is None for name in names):
        return None
    return np.stack([_column(tree, name, num_rows) for name in names], axis=1)


def _column(tree: SourceTree, name: str, num_rows: int) -> npt.NDArray[np.int8]:
    file = tree.require("a list of labels", f"Groundtruth/{name}", name, archive="Groundtruth.zip")
    values = [line.strip() for line in tree.lines(file) if line.strip()]
    if len(values) != num_rows:
        raise DataError(f"{file} has {len(values)} labels, its image list has {num_rows} images")
    wrong = next((value for value in values if value not in ("0", "1")), None)
    if wrong is not None:
        raise DataError(f"{file}: label '{wrong}' is neither 0 nor 1")
    return np.array(values, dtype=np.int8)


def _from_all_labels(
    tree: SourceTree, concepts: list[str], paths: dict[str, list[str]]
) -> dict[str, npt.NDArray[np.int8] | None]:
    """Return the labels of each split out of ``AllLabels``, whose rows follow the list of all images."""
    listed = _lines(tree, "the list of all images", "Imagelist.txt", ("ImageList/",), "ImageList.zip")
    place = {path.replace("\\", "/"): row for row, path in enumerate(listed)}
    for split, wanted in paths.items():
        strange = next((path for path in wanted if path not in place), None)
        if strange is not None:
            raise DataError(f"the {split} image {strange} is not in the list of all images")
    labels = np.zeros((len(listed), len(concepts)), dtype=np.int8)
    for column, concept in enumerate(concepts):
        labels[:, column] = _column(tree, f"AllLabels/Labels_{concept}.txt", len(listed))
    return {split: labels[[place[path] for path in wanted]] for split, wanted in paths.items()}
