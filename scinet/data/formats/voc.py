"""PASCAL VOC 2007 and 2012: image lists, and an XML of objects an image."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from scinet.data.archives import read_source
from scinet.data.images import BrokenImageError
from scinet.data.records import Collection, ImageSource, Record
from scinet.data.source_tree import SourceTree
from scinet.errors import DataError, nearest

CLASS_NAMES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]

_LISTS = {2007: {"train": "trainval", "test": "test"}, 2012: {"train": "train", "test": "val"}}
_ARCHIVES = {
    2007: {"train": "VOCtrainval_06-Nov-2007.tar", "test": "VOCtest_06-Nov-2007.tar"},
    2012: {"train": "VOCtrainval_11-May-2012.tar", "test": "VOCtrainval_11-May-2012.tar"},
}
_DIFFICULT = {
    "ignore": "a class whose every object is marked difficult is unknown",
    "negative": "a class whose every object is marked difficult is absent, as in SSGRL, HCP and DualCoOp",
    "positive": "an object marked difficult counts like any other",
}


@dataclass(frozen=True)
class VocOptions:
    """What is read of a VOC tree; ``difficult`` is ignore, negative or positive."""

    source: Path
    year: int
    difficult: str = "ignore"


class BrokenAnnotationError(DataError):
    """An annotation that is there but says nothing: ``--missing skip`` leaves its image out."""


def collection(options: VocOptions, scratch: Path, skip_missing: bool) -> Collection:
    """Return VOC2007 (trainval, test) or VOC2012 (train, val).

    Raises:
        ConfigError: if the source folder does not exist.
        DataError: if a list is missing, or an annotation is not what it should be.
    """
    tree = SourceTree(options.source, scratch)
    year = options.year
    lists = tree.split_files(
        {split: _names(year, f"ImageSets/Main/{name}.txt") for split, name in _LISTS[year].items()},
        _ARCHIVES[year],
        skip_missing=skip_missing,
    )
    # the label lists of one class hold a second column; those of a split may come with one
    ids = {split: [words[0] for words in tree.words(file)] for split, file in lists.items()}
    for split, listed in ids.items():
        if not listed:
            raise DataError(f"{lists[split]} lists no image")

    def records() -> Iterator[Record]:
        for split, listed in ids.items():
            for image_id in listed:
                yield _record(tree, options, split, image_id, skip_missing=skip_missing)

    source: dict[str, Any] = {
        "name": f"PASCAL VOC {year}",
        "version": f"VOC{year}: " + ", ".join(f"{_LISTS[year][split]} as {split}" for split in lists),
        "licence": "images under Flickr's terms of use; annotations free for research",
        "url": f"http://host.robots.ox.ac.uk/pascal/VOC/voc{year}/",
        "traps": [f"difficult objects: {_DIFFICULT[options.difficult]} (difficult: {options.difficult})"],
        "absent_splits": sorted(set(_LISTS[year]) - set(lists)),
        "options": {"year": year, "difficult": options.difficult},
    }
    return Collection(
        f"voc{year}", CLASS_NAMES, source, records, sum(len(listed) for listed in ids.values()), read_source
    )


def _names(year: int, name: str) -> tuple[str, ...]:
    # archives that were unpacked each into a folder of its own name
    folders = [f"{archive.removesuffix('.tar')}/VOCdevkit/VOC{year}/" for archive in _ARCHIVES[year].values()]
    return tuple(f"{prefix}{name}" for prefix in (f"VOCdevkit/VOC{year}/", f"VOC{year}/", "", *dict.fromkeys(folders)))


def _record(tree: SourceTree, options: VocOptions, split: str, image_id: str, *, skip_missing: bool) -> Record:
    image, annotation = (
        tree.find(*_names(options.year, name)) for name in (f"JPEGImages/{image_id}.jpg", f"Annotations/{image_id}.xml")
    )
    if image is None or annotation is None:
        wanted = "JPEGImages/{}.jpg" if image is None else "Annotations/{}.xml"
        return Record(image_id, None, wanted.format(image_id), (), (), split)
    try:
        clear, difficult = _objects(annotation, options.year)
    except BrokenAnnotationError as error:
        if not skip_missing:
            raise
        return Record(image_id, None, str(error), (), (), split)
    positives = clear | difficult if options.difficult == "positive" else clear
    unknown = difficult - clear if options.difficult == "ignore" else set()
    negatives = set(range(len(CLASS_NAMES))) - positives - unknown
    return Record(image_id, image, "", tuple(sorted(positives)), tuple(sorted(negatives)), split)


def _objects(annotation: ImageSource, year: int) -> tuple[set[int], set[int]]:
    """Return the classes with an object that is not difficult, and those with one that is."""
    found: tuple[set[int], set[int]] = (set(), set())
    try:
        root = ElementTree.parse(io.BytesIO(read_source(annotation))).getroot()
        if root.tag != "annotation":
            raise BrokenAnnotationError(f"{annotation} is no VOC annotation: it begins with <{root.tag}>")
        folder = (root.findtext("folder") or "").strip()
        if re.fullmatch(r"VOC\d{4}", folder) and folder != f"VOC{year}":
            raise DataError(f"{annotation} belongs to {folder}, expected VOC{year}: build {folder.lower()} instead")
        for thing in root.iter("object"):
            name = (thing.findtext("name") or "").strip()
            if name not in CLASS_NAMES:
                raise DataError(f"{annotation} names the class '{name}'{nearest(name, CLASS_NAMES)}")
            is_difficult = (thing.findtext("difficult") or "0").strip() == "1"
            found[is_difficult].add(CLASS_NAMES.index(name))
    except (ElementTree.ParseError, LookupError, BrokenImageError) as error:
        raise BrokenAnnotationError(f"{annotation} is no VOC annotation: {error}") from error
    return found
