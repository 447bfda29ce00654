"""COCO's instance files, at once or inside the official archives."""

from __future__ import annotations

import json
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from scinet.data.formats.coco import CocoOptions, collection
from scinet.errors import DataError
from tests.scinet.data.formats.conftest import Build, Write, pack, same_shards, truth

# listed out of order and with a gap, as ids are
CATEGORIES = [{"id": 3, "name": "car"}, {"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]


def _instances(part: str, found_in: dict[int, list[int]], **more: Any) -> str:
    files = [
        {"license": 3, "file_name": f"COCO_{part}_{i:012d}.jpg", "height": 8, "width": 8, "id": i} for i in found_in
    ]
    annotations = [
        {"segmentation": [[1.5, 2.0]], "iscrowd": n, "image_id": i, "bbox": [0, 0, 1.5, 2], "category_id": c, "id": n}
        for i, found in found_in.items()
        for n, c in enumerate(found)
    ]
    tree = {"info": {"year": 2014}, "images": files, "licenses": [], "annotations": annotations}
    return json.dumps(tree | {"categories": CATEGORIES} | more)


@pytest.fixture
def coco2014(tmp_path: Path, write: Write) -> Path:
    files: dict[str, str | int] = {
        "annotations/instances_train2014.json": _instances("train2014", {9: [3, 3, 1], 25: [], 30: [90]}),
        "annotations/instances_val2014.json": _instances("val2014", {42: [1], 73: []}),
    }
    for number in (9, 25, 30):
        files[f"train2014/COCO_train2014_{number:012d}.jpg"] = number
    for number in (42, 73):
        files[f"val2014/COCO_val2014_{number:012d}.jpg"] = number
    return write(tmp_path / "raw", files)


def test_classes_follow_their_ids_and_empty_images_stay(coco2014: Path, build_from: Build) -> None:
    card = build_from(partial(collection, CocoOptions(coco2014, 2014)))
    assert card.class_names == ("person", "car", "toothbrush")
    assert truth(card, "train") == {
        "COCO_train2014_000000000009": (("person", "car"), ("toothbrush",)),
        "COCO_train2014_000000000025": ((), ("person", "car", "toothbrush")),
        "COCO_train2014_000000000030": (("toothbrush",), ("person", "car")),
    }
    assert set(truth(card, "test")) == {"COCO_val2014_000000000042", "COCO_val2014_000000000073"}
    assert card.source["images_without_annotation"] == {"train": 1, "test": 1}


def test_empty_images_go_when_told(coco2014: Path, build_from: Build) -> None:
    card = build_from(partial(collection, CocoOptions(coco2014, 2014, drop_empty=True)))
    assert {name: split.num_samples for name, split in card.splits.items()} == {"train": 2, "test": 1}
    assert any("drop_empty: true" in trap for trap in card.source["traps"])


def test_shards_are_the_same_when_read_inside_the_official_archives(coco2014: Path, build_from: Build) -> None:
    plain = build_from(partial(collection, CocoOptions(coco2014, 2014)), name="plain")
    pack(coco2014, "annotations_trainval2014.zip", "annotations")
    pack(coco2014, "train2014.zip", "train2014")
    pack(coco2014, "val2014.zip", "val2014")
    assert same_shards(build_from(partial(collection, CocoOptions(coco2014, 2014)), name="packed"), plain)


def test_2017_is_read_when_images_lie_in_a_folder_of_their_own(tmp_path: Path, write: Write, build_from: Build) -> None:
    one = _instances("x", {7: [1]}, images=[{"id": 7, "file_name": "000000000007.jpg"}])
    two = _instances("x", {8: [1]}, images=[{"id": 8, "file_name": "000000000008.jpg"}])
    files: dict[str, str | int] = {
        "annotations/instances_train2017.json": one,
        "annotations/instances_val2017.json": two,
        "images/train2017/000000000007.jpg": 1,
        "val2017/000000000008.jpg": 2,
    }
    card = build_from(partial(collection, CocoOptions(write(tmp_path / "raw", files), 2017)))
    assert list(truth(card, "train")) == ["000000000007"]
    assert list(truth(card, "test")) == ["000000000008"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "no COCO instance file"),
        ('{"images": [{"id": 1}]}', "no COCO instance file"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name"', "no COCO instance file"),
        (_instances("val2014", {42: [5]}), "category 5"),
        (_instances("val2014", {42: [1]}, images=[{"id": 1, "file_name": "1.jpg"}]), "image 42"),
        (_instances("val2014", {42: [1]}, images=[]), "lists no image"),
        (_instances("val2014", {42: []}), "lists no annotation: is it an instances file, and whole"),
        (_instances("val2014", {42: [1]}) + "}", "no COCO instance file: ValueError '}' stands after its end"),
        (_instances("val2014", {42: [1]}, images=[{"id": 42, "file_name": "a.jpg"}] * 2), "lists image 42 twice"),
        ('{"images": ' + "[" * 100_000, "no COCO instance file: RecursionError"),
        (_instances("val2014", {42: [1]}, categories=[{"id": 1, "name": "cat"}]), "other categories"),
        ('{"images": [], "annotations": []}', "lists no category"),
    ],
)
def test_file_is_named_when_it_is_not_what_it_should_be(
    coco2014: Path, build_from: Build, text: str, words: str
) -> None:
    (coco2014 / "annotations/instances_val2014.json").write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        build_from(partial(collection, CocoOptions(coco2014, 2014)))
    assert "instances_val2014.json" in str(caught.value)


def test_official_names_are_told_when_the_other_year_lies_there(coco2014: Path, build_from: Build) -> None:
    with pytest.raises(DataError) as caught:
        build_from(partial(collection, CocoOptions(coco2014, 2017)))
    assert "annotations/instances_train2017.json" in str(caught.value)
    assert "annotations_trainval2017.zip" in str(caught.value)
    assert "did you mean 'instances_train2014.json'" in str(caught.value)


def test_image_outside_the_source_is_never_read_when_a_list_names_one(
    coco2014: Path, build_from: Build, write: Write
) -> None:
    write(coco2014.parent, {"secret.jpg": 1})
    text = _instances("val2014", {1: [1]}, images=[{"id": 1, "file_name": "../../secret.jpg"}])
    (coco2014 / "annotations/instances_val2014.json").write_text(text)
    with pytest.raises(DataError, match=r"1 of 4 images are missing \(val2014/../../secret.jpg\)"):
        build_from(partial(collection, CocoOptions(coco2014, 2014)))


def test_list_is_refused_when_a_bit_of_its_archive_has_changed(coco2014: Path, build_from: Build) -> None:
    with zipfile.ZipFile(coco2014 / "annotations_trainval2014.zip", "w", zipfile.ZIP_STORED) as archive:
        for path in sorted((coco2014 / "annotations").iterdir()):
            archive.write(path, f"annotations/{path.name}")
            path.unlink()
    content = (coco2014 / "annotations_trainval2014.zip").read_bytes()
    changed = content.replace(b'"image_id": 42', b'"image_id": 58', 1) if b'"image_id": 42' in content else b""
    assert changed
    (coco2014 / "annotations_trainval2014.zip").write_bytes(changed)
    with pytest.raises(DataError, match=r"json is damaged: its checksum .*; download the archive again"):
        build_from(partial(collection, CocoOptions(coco2014, 2014)))
