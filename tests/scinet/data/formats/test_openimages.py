"""Open Images keeps what people verified, present and absent, and nothing else."""

from __future__ import annotations

import gzip
from functools import partial
from pathlib import Path

import pytest

from scinet.data.card import DataCard
from scinet.data.formats.openimages import OpenImagesOptions, collection
from scinet.errors import DataError
from tests.scinet.data.formats.conftest import Build, Write, pack, same_shards, truth

HEADER = "ImageID,Source,LabelName,Confidence\n"
TRAIN = (
    "000002b66c9c498e,verification,/m/01g317,1\n"
    "f00002b66c9c498f,crowdsource-verification,/m/0cmf2,0\n"
    "000002b66c9c498e,verification,/m/0cmf2,0\n"
    "000002b66c9c498e,machine,/m/04rky,0.7\n"
    "000002b66c9c498e,verification,/m/unlisted,1\n"
    "f00002b66c9c498f,verification,/m/04rky,1\n"
    "f00002b66c9c498f,crowdsource-verification,/m/04rky,0\n"
)


@pytest.fixture
def openimages(tmp_path: Path, write: Write) -> Path:
    return write(
        tmp_path / "raw",
        {
            "oidv6-classes-trainable.txt": "/m/01g317\n/m/0cmf2\n/m/04rky\n/m/04rkz\n",
            "oidv6-class-descriptions.csv": 'LabelName,DisplayName\n/m/0cmf2,Airplane\n/m/01g317,"Person, standing"\n'
            "/m/04rky,Mammal\n/m/04rkz,Mammal\n/m/unlisted,Thing\n",
            "oidv6-train-annotations-human-imagelabels.csv": HEADER + TRAIN,
            "validation-annotations-human-imagelabels.csv": f"{HEADER}0001eeaf4aed83f9,verification,/m/0cmf2,1\n",
            "test-annotations-human-imagelabels.csv": f"{HEADER}000026e7ee790996,verification,/m/04rkz,0\n",
            "train_0/000002b66c9c498e.jpg": 1,
            "train_f/f00002b66c9c498f.jpg": 2,
            "validation/0001eeaf4aed83f9.jpg": 3,
            "test/000026e7ee790996.jpg": 4,
        },
    )


def _build(build_from: Build, root: Path, **given: object) -> DataCard:
    return build_from(partial(collection, OpenImagesOptions(root)), **given)


def test_both_verified_signs_are_kept_and_nothing_else(openimages: Path, build_from: Build) -> None:
    card = _build(build_from, openimages)
    assert card.class_names == ("Person, standing", "Airplane", "Mammal (/m/04rky)", "Mammal (/m/04rkz)")
    assert truth(card, "train") == {
        "000002b66c9c498e": (("Person, standing",), ("Airplane",)),
        "f00002b66c9c498f": ((), ("Airplane",)),
    }
    assert truth(card, "holdout") == {"0001eeaf4aed83f9": (("Airplane",), ())}
    assert truth(card, "test") == {"000026e7ee790996": ((), ("Mammal (/m/04rkz)",))}
    assert card.source["rows"] == {
        "used": 7,
        "ignored_from_machines": 1,
        "ignored_of_other_classes": 1,
        "cells_verified_both_ways": 1,
    }


def test_shards_are_the_same_when_lists_and_images_are_packed(openimages: Path, build_from: Build) -> None:
    plain = _build(build_from, openimages, name="plain")
    for path in list(openimages.glob("*-imagelabels.csv")):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    pack(openimages, "train_0.tar.gz", "train_0")
    pack(openimages, "train_f.tar", "train_f")
    pack(openimages, "validation.tar.gz", "validation")
    pack(openimages, "test.zip", "test")
    assert same_shards(_build(build_from, openimages, name="packed"), plain)


def test_images_are_found_when_train_is_one_folder(openimages: Path, build_from: Build) -> None:
    for folder in ("train_0", "train_f"):
        (openimages / "train").mkdir(exist_ok=True)
        for path in (openimages / folder).iterdir():
            path.rename(openimages / "train" / path.name)
    assert _build(build_from, openimages).split("train").num_samples == 2


def test_nine_thousand_classes_stay_sparse(openimages: Path, build_from: Build, write: Write) -> None:
    codes = [f"/m/{number:05d}" for number in range(9605)]
    rows = "".join(f"000002b66c9c498e,verification,{code},{n % 2}\n" for n, code in enumerate(codes[::100]))
    write(
        openimages,
        {
            "oidv6-classes-trainable.txt": "\n".join(codes),
            "oidv6-class-descriptions.csv": "".join(f"{code},class {code}\n" for code in codes),
            "oidv6-train-annotations-human-imagelabels.csv": HEADER + rows,
            "validation-annotations-human-imagelabels.csv": f"{HEADER}0001eeaf4aed83f9,verification,/m/00001,1\n",
            "test-annotations-human-imagelabels.csv": f"{HEADER}000026e7ee790996,verification,/m/00002,0\n",
        },
    )
    card = _build(build_from, openimages)
    assert card.num_classes == 9605
    assert sum(card.split("train").num_positives) == 48
    pairs = card.split("train").cooccurrence
    assert pairs is not None
    assert (len(pairs.first), pairs.is_whole) == (48 * 47 // 2, True)


@pytest.mark.parametrize(
    ("row", "words"),
    [("0001eeaf4aed83f9,verification,/m/0cmf2,0.5", "line 2: confidence '0.5'"), ("0001,verification", "line 2 has 2")],
)
def test_line_is_named_when_it_is_wrong(openimages: Path, build_from: Build, row: str, words: str) -> None:
    path = openimages / "validation-annotations-human-imagelabels.csv"
    path.write_text(f"{HEADER}{row}\n")
    with pytest.raises(DataError, match=f"validation-annotations-human-imagelabels.csv {words}"):
        _build(build_from, openimages)


def test_header_is_shown_when_it_is_that_of_another_file(openimages: Path, build_from: Build) -> None:
    path = openimages / "validation-annotations-human-imagelabels.csv"
    path.write_text("ImageID,Source,LabelName,Confidence,XMin\n".replace("Source", "Sauce"))
    with pytest.raises(DataError, match="begins with 'ImageID,Sauce"):
        _build(build_from, openimages)


def test_list_is_named_when_the_classes_are_missing(openimages: Path, build_from: Build) -> None:
    (openimages / "oidv6-classes-trainable.txt").rename(openimages / "oidv6-class-trainable.txt")
    with pytest.raises(DataError, match=r"expected oidv6-classes-trainable.txt; did you mean 'oidv6-class-train"):
        _build(build_from, openimages)


def test_build_goes_on_without_a_split_when_told(openimages: Path, build_from: Build) -> None:
    (openimages / "test-annotations-human-imagelabels.csv").unlink()
    with pytest.raises(DataError, match="the list of test images is missing"):
        _build(build_from, openimages)
    assert list(_build(build_from, openimages, skip=True).splits) == ["train", "holdout"]


def test_file_is_named_when_it_is_no_csv(openimages: Path, build_from: Build) -> None:
    path = openimages / "test-annotations-human-imagelabels.csv"
    path.write_text(HEADER + "a" * 200_000 + ",verification,/m/0cmf2,1\n")
    with pytest.raises(DataError, match=r"test-annotations-human-imagelabels.csv is not readable as CSV"):
        _build(build_from, openimages)
