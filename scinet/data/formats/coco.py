"""COCO 2014 and 2017: instance annotations in one JSON a split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from scinet.data.archives import read_source
from scinet.data.formats.json_stream import top_level
from scinet.data.records import Collection, ImageSource, Record
from scinet.data.source_tree import SourceTree, open_text
from scinet.errors import DataError

_SPLITS = {"train": "train", "test": "val"}


@dataclass(frozen=True)
class CocoOptions:
    """What is read of a COCO tree; ``drop_empty`` leaves out images without any annotation."""

    source: Path
    year: int
    drop_empty: bool = False


@dataclass(frozen=True)
class _Instances:
    """One annotation file: names by category id, file names by image id, category ids by image id."""

    categories: dict[int, str]
    files: dict[int, str]
    present: dict[int, set[int]]


def collection(options: CocoOptions, scratch: Path, skip_missing: bool) -> Collection:
    """Return COCO's train split, and its val split as test; 80 classes in the order of their ids.

    Raises:
        ConfigError: if the source folder does not exist.
        DataError: if an annotation file is missing or not what it should be.
    """
    tree, year = SourceTree(options.source, scratch), options.year
    lists = tree.split_files(
        {
            split: tuple(f"{folder}instances_{part}{year}.json" for folder in ("annotations/", ""))
            for split, part in _SPLITS.items()
        },
        dict.fromkeys(_SPLITS, f"annotations_trainval{year}.zip"),
        skip_missing=skip_missing,
    )
    read = {split: _read(file) for split, file in lists.items()}
    categories = next(iter(read.values())).categories
    for split, instances in read.items():
        if instances.categories != categories:
            raise DataError(f"{lists[split]} has other categories than {next(iter(lists.values()))}")
    position = {category: place for place, category in enumerate(sorted(categories))}
    empty = {split: sum(not found for found in part.present.values()) for split, part in read.items()}
    num_records = sum(len(part.files) for part in read.values())
    source: dict[str, Any] = {
        "name": f"COCO {year}",
        "version": f"instances {year}: " + ", ".join(f"{_SPLITS[split]} as {split}" for split in lists),
        "licence": "annotations CC BY 4.0; images under Flickr's terms of use",
        "url": "https://cocodataset.org",
        "traps": [
            f"images without any annotation are {'left out' if options.drop_empty else 'kept, every class absent'} "
            f"(drop_empty: {str(options.drop_empty).lower()})",
            "a class counts as present if it has any annotation, crowds included",
            "category ids have gaps: class indices follow the ids in ascending order",
            "2014 and 2017 split the same photographs differently: never train on one and test on the other",
        ],
        "images_without_annotation": empty,
        "absent_splits": sorted(set(_SPLITS) - set(lists)),
        "options": {"year": year, "drop_empty": options.drop_empty},
    }

    def records() -> Iterator[Record]:
        for split, instances in read.items():
            folder = f"{_SPLITS[split]}{year}"
            for image_id, file in instances.files.items():
                positives = tuple(sorted(position[category] for category in instances.present[image_id]))
                if positives or not options.drop_empty:
                    negatives = tuple(sorted(set(range(len(position))) - set(positives)))
                    image = tree.find(f"{folder}/{file}", f"images/{folder}/{file}", f"images/{file}")
                    yield Record(PurePosixPath(file).stem, image, f"{folder}/{file}", positives, negatives, split)

    return Collection(
        f"coco{year}",
        [categories[category] for category in sorted(categories)],
        source,
        records,
        num_records - options.drop_empty * sum(empty.values()),
        read_source,
    )


def _read(file: ImageSource) -> _Instances:
    """Read an annotation file, of which only ids and names stay in memory."""
    instances = _Instances({}, {}, {})
    annotated: dict[int, set[int]] = {}
    try:
        with open_text(file) as text:
            for key, value in top_level(text):
                if key == "categories":
                    instances.categories[int(value["id"])] = str(value["name"])
                elif key == "images":
                    if int(value["id"]) in instances.files:
                        raise DataError(f"{file} lists image {value['id']} twice")
                    instances.files[int(value["id"])] = str(value["file_name"])
                elif key == "annotations":
                    annotated.setdefault(int(value["image_id"]), set()).add(int(value["category_id"]))
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise DataError(f"{file} is no COCO instance file: {type(error).__name__} {error}") from error
    for what, found in (("category", instances.categories), ("image", instances.files), ("annotation", annotated)):
        if not found:
            raise DataError(f"{file} lists no {what}: is it an instances file, and whole?")
    for image_id in instances.files:
        instances.present[image_id] = annotated.pop(image_id, set())
    strange = set().union(*instances.present.values()) - set(instances.categories)
    if annotated or strange:
        what = f"image {min(annotated)}" if annotated else f"category {min(strange)}"
        raise DataError(f"{file} annotates {what}, which it does not list")
    return instances
