"""VOC trees say what their XML says, and difficult objects what the option says."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from scinet.data.formats.voc import CLASS_NAMES, VocOptions, collection
from scinet.errors import ConfigError, DataError
from tests.scinet.data.formats.conftest import Build, Write, pack, same_shards, truth


def _xml(*objects: str) -> str:
    """An annotation; ``dog*`` is a difficult dog."""
    things = "".join(
        f"<object><name>{name.rstrip('*')}</name><difficult>{int(name.endswith('*'))}</difficult>"
        "<bndbox><xmin>1</xmin></bndbox><part><name>head</name></part></object>"
        for name in objects
    )
    return f"<annotation><folder>VOC2007</folder><filename>x.jpg</filename>{things}</annotation>"


ANNOTATIONS = {
    "000005": ("chair", "chair", "dog*"),
    "000007": ("car",),
    "000009": ("dog*", "dog", "person*"),
    "000001": ("cat*",),
    "000002": (),
}


@pytest.fixture
def voc2007(tmp_path: Path, write: Write) -> Path:
    base = "VOCdevkit/VOC2007"
    files: dict[str, str | int] = {f"{base}/ImageSets/Main/trainval.txt": "000005\n000007\n000009\n"}
    files[f"{base}/ImageSets/Main/test.txt"] = "000001\r\n000002"
    for number, (name, objects) in enumerate(ANNOTATIONS.items()):
        files[f"{base}/JPEGImages/{name}.jpg"] = number
        files[f"{base}/Annotations/{name}.xml"] = _xml(*objects)
    return write(tmp_path / "raw", files)


def _absent(*present: str) -> tuple[str, ...]:
    return tuple(name for name in CLASS_NAMES if name not in present)


def test_difficult_objects_are_unknown_when_nothing_is_said(voc2007: Path, build_from: Build) -> None:
    card = build_from(partial(collection, VocOptions(voc2007, 2007)))
    assert truth(card, "train") == {
        "000005": (("chair",), _absent("chair", "dog")),
        "000007": (("car",), _absent("car")),
        "000009": (("dog",), _absent("dog", "person")),
    }
    assert truth(card, "test") == {"000001": ((), _absent("cat")), "000002": ((), _absent())}
    assert (card.name, card.num_classes) == ("voc2007", 20)
    assert card.source["options"] == {"year": 2007, "difficult": "ignore"}
    assert any("difficult" in trap for trap in card.source["traps"])


def test_difficult_objects_are_absent_or_present_when_told(voc2007: Path, build_from: Build) -> None:
    negative = build_from(partial(collection, VocOptions(voc2007, 2007, "negative")), name="negative")
    assert truth(negative, "test")["000001"] == ((), _absent())
    positive = build_from(partial(collection, VocOptions(voc2007, 2007, "positive")), name="positive")
    assert truth(positive, "test")["000001"] == (("cat",), _absent("cat"))
    assert truth(positive, "train")["000009"] == (("dog", "person"), _absent("dog", "person"))


def test_shards_are_the_same_when_read_inside_the_official_archives(voc2007: Path, build_from: Build) -> None:
    plain = build_from(partial(collection, VocOptions(voc2007, 2007)), name="plain")
    base = "VOCdevkit/VOC2007"
    test = [f"{base}/{name}" for name in ("ImageSets/Main/test.txt", "JPEGImages/000001.jpg", "JPEGImages/000002.jpg")]
    pack(voc2007, "VOCtest_06-Nov-2007.tar", *test, f"{base}/Annotations/000001.xml", f"{base}/Annotations/000002.xml")
    pack(voc2007, "VOCtrainval_06-Nov-2007.tar", "VOCdevkit")
    assert len(list(voc2007.iterdir())) == 2
    assert same_shards(build_from(partial(collection, VocOptions(voc2007, 2007)), name="packed"), plain)


@pytest.mark.parametrize("inner", ["VOCdevkit", "VOCdevkit/VOC2007"])
def test_tree_is_found_when_the_source_is_an_inner_folder(voc2007: Path, build_from: Build, inner: str) -> None:
    card = build_from(partial(collection, VocOptions(voc2007 / inner, 2007)))
    assert card.split("train").num_samples == 3


def test_voc2012_takes_val_as_test(tmp_path: Path, write: Write, build_from: Build) -> None:
    base = "VOCdevkit/VOC2012"
    root = write(
        tmp_path / "raw",
        {
            f"{base}/ImageSets/Main/train.txt": "2008_000002\n",
            f"{base}/ImageSets/Main/val.txt": "2008_000003\n",
            f"{base}/JPEGImages/2008_000002.jpg": 1,
            f"{base}/JPEGImages/2008_000003.jpg": 2,
            f"{base}/Annotations/2008_000002.xml": _xml("tvmonitor").replace("VOC2007", "VOC2012"),
            f"{base}/Annotations/2008_000003.xml": _xml("train", "person").replace("VOC2007", "VOC2012"),
        },
    )
    card = build_from(partial(collection, VocOptions(root, 2012)))
    assert truth(card, "train") == {"2008_000002": (("tvmonitor",), _absent("tvmonitor"))}
    assert truth(card, "test") == {"2008_000003": (("person", "train"), _absent("person", "train"))}
    assert "val as test" in card.source["version"]


def test_list_is_named_when_the_test_archive_was_not_downloaded(voc2007: Path, build_from: Build) -> None:
    (voc2007 / "VOCdevkit/VOC2007/ImageSets/Main/test.txt").unlink()
    with pytest.raises(DataError) as caught:
        build_from(partial(collection, VocOptions(voc2007, 2007)))
    for words in ("the list of test images", "ImageSets/Main/test.txt", "VOCtest_06-Nov-2007.tar", "--missing skip"):
        assert words in str(caught.value)
    card = build_from(partial(collection, VocOptions(voc2007, 2007)), skip=True)
    assert list(card.splits) == ["train"]
    assert card.source["absent_splits"] == ["test"]


def test_images_and_annotations_are_listed_when_missing(voc2007: Path, build_from: Build, tmp_path: Path) -> None:
    (voc2007 / "VOCdevkit/VOC2007/JPEGImages/000007.jpg").unlink()
    (voc2007 / "VOCdevkit/VOC2007/Annotations/000001.xml").unlink()
    with pytest.raises(DataError, match=r"2 of 5 images are missing \(JPEGImages/000007.jpg, Annotations/000001.xml\)"):
        build_from(partial(collection, VocOptions(voc2007, 2007)))
    listed = (tmp_path / ".out.building/plan/missing.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["000007", "000001"]
    card = build_from(partial(collection, VocOptions(voc2007, 2007)), skip=True)
    assert (card.missing.count, card.num_indices) == (2, 3)
    assert (card.directory / card.missing.file).read_text().splitlines() == listed


def test_class_is_named_when_an_annotation_spells_it_otherwise(voc2007: Path, build_from: Build) -> None:
    (voc2007 / "VOCdevkit/VOC2007/Annotations/000007.xml").write_text(_xml("aeroplan"))
    with pytest.raises(DataError, match=r"000007.xml names the class 'aeroplan'; did you mean 'aeroplane'"):
        build_from(partial(collection, VocOptions(voc2007, 2007)))


def test_annotation_is_named_when_it_is_no_xml(voc2007: Path, build_from: Build) -> None:
    (voc2007 / "VOCdevkit/VOC2007/Annotations/000007.xml").write_text("<annotation>")
    with pytest.raises(DataError, match=r"000007.xml is no VOC annotation"):
        build_from(partial(collection, VocOptions(voc2007, 2007)))


def test_source_is_suggested_when_it_does_not_exist(voc2007: Path, build_from: Build) -> None:
    with pytest.raises(ConfigError, match=r"rwa does not exist; did you mean '.*raw'"):
        build_from(partial(collection, VocOptions(voc2007.with_name("rwa"), 2007)))


def test_other_year_is_refused_when_its_folder_is_given(voc2007: Path, build_from: Build) -> None:
    inner = voc2007 / "VOCdevkit/VOC2007"
    for name in ("train", "val"):
        (inner / f"ImageSets/Main/{name}.txt").write_text("000005\n")
    with pytest.raises(DataError, match=r"000005.xml belongs to VOC2007, expected VOC2012: build voc2007 instead"):
        build_from(partial(collection, VocOptions(inner, 2012)))


def test_archives_are_found_when_each_was_unpacked_into_its_own_folder(
    voc2007: Path, build_from: Build, tmp_path: Path
) -> None:
    plain = build_from(partial(collection, VocOptions(voc2007, 2007)), name="plain")
    for archive in ("VOCtrainval_06-Nov-2007", "VOCtest_06-Nov-2007"):
        shutil.copytree(voc2007, tmp_path / "apart" / archive)
    (tmp_path / "apart/VOCtrainval_06-Nov-2007/VOCdevkit/VOC2007/ImageSets/Main/test.txt").unlink()
    apart = build_from(partial(collection, VocOptions(tmp_path / "apart", 2007)), name="out")
    assert same_shards(apart, plain)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("<html><body>404</body></html>", "begins with <html>"),
        ("<annotation><object>", "is no VOC annotation"),
        ("", "is no VOC annotation"),
        ("<?xml version='1.0' encoding='klingon'?><annotation/>", "unknown encoding"),
    ],
)
def test_image_is_left_out_when_its_annotation_says_nothing(
    voc2007: Path, build_from: Build, content: str, words: str
) -> None:
    (voc2007 / "VOCdevkit/VOC2007/Annotations/000007.xml").write_text(content)
    with pytest.raises(DataError, match=words):
        build_from(partial(collection, VocOptions(voc2007, 2007)))
    card = build_from(partial(collection, VocOptions(voc2007, 2007)), skip=True)
    assert card.missing.count == 1
    assert words in (card.directory / card.missing.file).read_text()


def test_list_is_refused_when_it_is_empty(voc2007: Path, build_from: Build) -> None:
    (voc2007 / "VOCdevkit/VOC2007/ImageSets/Main/trainval.txt").write_text("")
    with pytest.raises(DataError, match=r"trainval.txt lists no image"):
        build_from(partial(collection, VocOptions(voc2007, 2007)), skip=True)
