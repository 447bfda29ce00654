"""NUS-WIDE's text lists and its two published versions."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from scinet.data.formats.nuswide import NusWideOptions, collection
from scinet.errors import DataError
from tests.scinet.data.formats.conftest import Build, Write, pack, same_shards, truth

CONCEPTS = ["airport", "animal", "beach"]
TRAIN = {"actor\\0001_21.jpg": "010", "zebra\\0002_22.jpg": "000", "zebra\\0003_23.jpg": "110"}
TEST = {"actor\\0004_24.jpg": "001", "zebra\\0005_25.jpg": "000"}


def _labels(rows: dict[str, str], column: int) -> str:
    return "".join(f"{row[column]}\n" for row in rows.values())


@pytest.fixture
def nuswide(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("scinet.data.formats.nuswide.NUM_CONCEPTS", len(CONCEPTS))
    files: dict[str, str | int] = {
        "ConceptsList/Concepts81.txt": "\r\n".join(CONCEPTS) + "\r\n",
        "ImageList/TrainImagelist.txt": "".join(f"{path}\n" for path in TRAIN),
        "ImageList/TestImagelist.txt": "".join(f"{path}\n" for path in TEST),
        # another order than the two lists
        "ImageList/Imagelist.txt": "".join(f"{path}\n" for path in sorted(TRAIN | TEST)),
    }
    for column, concept in enumerate(CONCEPTS):
        files[f"Groundtruth/TrainTestLabels/Labels_{concept}_Train.txt"] = _labels(TRAIN, column)
        files[f"Groundtruth/TrainTestLabels/Labels_{concept}_Test.txt"] = _labels(TEST, column)
        files[f"Groundtruth/AllLabels/Labels_{concept}.txt"] = _labels(dict(sorted((TRAIN | TEST).items())), column)
    for number, path in enumerate(TRAIN | TEST):
        files["Flickr/" + path.replace("\\", "/")] = number
    return write(tmp_path / "raw", files)


def test_empty_rows_are_kept_as_absent_when_the_version_has_them(nuswide: Path, build_from: Build) -> None:
    card = build_from(partial(collection, NusWideOptions(nuswide, "cole")))
    assert truth(card, "train") == {
        "actor/0001_21": (("animal",), ("airport", "beach")),
        "zebra/0002_22": ((), tuple(CONCEPTS)),
        "zebra/0003_23": (("airport", "animal"), ("beach",)),
    }
    assert set(truth(card, "test")) == {"actor/0004_24", "zebra/0005_25"}
    assert card.name == "nuswide-cole"
    assert "150,000/60,260" in card.source["version"]
    assert card.source["rows_without_a_concept"] == {"train": 1, "test": 1}


def test_empty_rows_are_left_out_when_the_version_has_none(nuswide: Path, build_from: Build) -> None:
    card = build_from(partial(collection, NusWideOptions(nuswide, "asl")))
    assert set(truth(card, "train")) == {"actor/0001_21", "zebra/0003_23"}
    assert set(truth(card, "test")) == {"actor/0004_24"}
    assert "119,103/50,720" in card.source["version"]
    assert card.source["official_rows"] == {"train": 3, "test": 2}


def test_shards_are_the_same_when_only_the_labels_of_all_images_are_there(nuswide: Path, build_from: Build) -> None:
    split = build_from(partial(collection, NusWideOptions(nuswide, "cole")), name="split")
    for path in (nuswide / "Groundtruth/TrainTestLabels").iterdir():
        path.unlink()
    assert same_shards(build_from(partial(collection, NusWideOptions(nuswide, "cole")), name="all"), split)


def test_shards_are_the_same_when_read_inside_the_official_archives(nuswide: Path, build_from: Build) -> None:
    plain = build_from(partial(collection, NusWideOptions(nuswide, "cole")), name="plain")
    for archive, part in (("ImageList.zip", "ImageList"), ("Groundtruth.zip", "Groundtruth"), ("Flickr.zip", "Flickr")):
        pack(nuswide, archive, part)
    pack(nuswide, "ConceptsList.zip", "ConceptsList")
    assert all(path.suffix == ".zip" for path in nuswide.iterdir())
    assert same_shards(build_from(partial(collection, NusWideOptions(nuswide, "cole")), name="packed"), plain)


def test_images_are_found_when_they_lie_in_one_folder(nuswide: Path, build_from: Build) -> None:
    (nuswide / "images").mkdir()
    for path in list((nuswide / "Flickr").rglob("*.jpg")):
        path.rename(nuswide / "images" / path.name)
    assert build_from(partial(collection, NusWideOptions(nuswide, "cole"))).num_indices == 5


def test_dead_links_are_listed_and_left_out_when_told(nuswide: Path, build_from: Build) -> None:
    (nuswide / "Flickr/zebra/0003_23.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 5 images are missing \(Flickr/zebra/0003_23.jpg\)"):
        build_from(partial(collection, NusWideOptions(nuswide, "cole")))
    card = build_from(partial(collection, NusWideOptions(nuswide, "cole")), skip=True)
    assert card.missing.count == 1
    assert "zebra/0003_23" in (card.directory / "missing.txt").read_text()


@pytest.mark.parametrize(("text", "words"), [("0\n1\n", "has 2 labels.*has 3 images"), ("0\n2\n1\n", "label '2'")])
def test_list_is_named_when_it_does_not_fit(nuswide: Path, build_from: Build, text: str, words: str) -> None:
    (nuswide / "Groundtruth/TrainTestLabels/Labels_beach_Train.txt").write_text(text)
    with pytest.raises(DataError, match=f"Labels_beach_Train.txt.*{words}"):
        build_from(partial(collection, NusWideOptions(nuswide, "cole")))


def test_list_is_named_when_one_concept_is_missing(nuswide: Path, build_from: Build) -> None:
    (nuswide / "Groundtruth/TrainTestLabels/Labels_beach_Test.txt").unlink()
    with pytest.raises(DataError, match=r"Labels_beach_Test.txt, there or in Groundtruth.zip"):
        build_from(partial(collection, NusWideOptions(nuswide, "cole")))


def test_concepts_are_counted_when_the_list_is_read(
    nuswide: Path, build_from: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"Concepts81.txt, names 3, expected 81"):
        build_from(partial(collection, NusWideOptions(nuswide, "cole")))


def test_list_of_labels_is_named_when_only_the_first_is_missing(nuswide: Path, build_from: Build) -> None:
    (nuswide / f"Groundtruth/TrainTestLabels/Labels_{CONCEPTS[0]}_Train.txt").unlink()
    with pytest.raises(DataError, match=f"Labels_{CONCEPTS[0]}_Train.txt"):
        build_from(partial(collection, NusWideOptions(nuswide, "cole")))
