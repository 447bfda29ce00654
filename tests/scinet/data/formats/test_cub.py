"""CUB's attribute table, its certainties and its malformed lines."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from scinet.data.formats.cub import CubOptions, collection
from scinet.errors import ConfigError, DataError
from tests.scinet.data.formats.conftest import Build, Write, pack, same_shards, truth

IMAGES = {
    1: "001.Albatross/Albatross_0046_18.jpg",
    2: "001.Albatross/Albatross_0009_34.jpg",
    3: "002.Auk/Auk_0001_1.jpg",
}
LABELS = """\
1 1 1 4 5.06
1 2 0 1 0.9
1 3 0 3 1.1
2 1 0 2 1.0
2 2 1 3 0 0.766
2 3 0 5 1.0
3 1 1 1 2.0
3 2 0 4 2.0
3 3 0 7 2.0
"""


@pytest.fixture
def cub(tmp_path: Path, write: Write) -> Path:
    files: dict[str, str | int] = {
        "attributes.txt": "1 has_bill_shape::curved_(up_or_down)\n2 has_bill_shape::dagger\n3 has_wing_color::blue\n",
        "CUB_200_2011/images.txt": "".join(f"{number} {file}\n" for number, file in IMAGES.items()),
        "CUB_200_2011/train_test_split.txt": "1 0\n2 1\n3 1\n",
        "CUB_200_2011/attributes/image_attribute_labels.txt": LABELS,
        "CUB_200_2011/attributes/certainties.txt": "1 not visible\n2 guessing\n3 probably\n4 definitely\n",
    }
    return write(tmp_path / "raw", files | {f"CUB_200_2011/images/{file}": n for n, file in IMAGES.items()})


CURVED, DAGGER, BLUE = "has_bill_shape::curved_(up_or_down)", "has_bill_shape::dagger", "has_wing_color::blue"


def test_labels_count_whatever_their_certainty_when_nothing_is_said(cub: Path, build_from: Build) -> None:
    card = build_from(partial(collection, CubOptions(cub)))
    assert card.class_names == (CURVED, DAGGER, BLUE)
    assert truth(card, "test") == {"001.Albatross/Albatross_0046_18": ((CURVED,), (DAGGER, BLUE))}
    assert truth(card, "train") == {
        "001.Albatross/Albatross_0009_34": ((DAGGER,), (CURVED,)),
        "002.Auk/Auk_0001_1": ((CURVED,), (DAGGER,)),
    }
    assert [card.source[note] for note in ("lines_with_surplus_fields", "lines_without_a_label")] == [1, 2]
    assert any("none" in trap for trap in card.source["traps"])


def test_cells_are_unknown_when_their_certainty_is_named(cub: Path, build_from: Build) -> None:
    card = build_from(partial(collection, CubOptions(cub, (1, 2))))
    assert truth(card, "test") == {"001.Albatross/Albatross_0046_18": ((CURVED,), (BLUE,))}
    assert truth(card, "train") == {
        "001.Albatross/Albatross_0009_34": ((DAGGER,), ()),
        "002.Auk/Auk_0001_1": ((), (DAGGER,)),
    }
    assert card.source["labels_not_annotated_by_certainty"] == 3
    assert any("not visible, guessing" in trap for trap in card.source["traps"])


def test_certainties_are_listed_when_one_does_not_exist(cub: Path, build_from: Build) -> None:
    with pytest.raises(ConfigError, match="--certainty 5 is none of 1 not visible"):
        build_from(partial(collection, CubOptions(cub, (5,))))


def test_shards_are_the_same_when_read_inside_the_official_archive(
    cub: Path, build_from: Build, tmp_path: Path
) -> None:
    plain = build_from(partial(collection, CubOptions(cub)), name="plain")
    pack(cub, "CUB_200_2011.tgz", "attributes.txt", "CUB_200_2011")
    assert [path.name for path in cub.iterdir()] == ["CUB_200_2011.tgz"]
    assert same_shards(build_from(partial(collection, CubOptions(cub)), name="packed"), plain)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "plain", "raw"]


@pytest.mark.parametrize("place", ["CUB_200_2011/attributes.txt", "CUB_200_2011/attributes/attributes.txt"])
def test_attributes_are_found_when_they_were_moved(cub: Path, build_from: Build, place: str) -> None:
    (cub / "attributes.txt").rename(cub / place)
    assert build_from(partial(collection, CubOptions(cub))).num_classes == 3
    inner = build_from(partial(collection, CubOptions(cub / "CUB_200_2011")), name="inner")
    assert inner.split("train").num_samples == 2


def test_line_is_named_when_it_is_about_no_image(cub: Path, build_from: Build) -> None:
    path = cub / "CUB_200_2011/attributes/image_attribute_labels.txt"
    path.write_text(LABELS + "4 1 1 1 1.0\n")
    with pytest.raises(DataError, match=r"image_attribute_labels.txt line 10: '4 1 1 1 1.0'"):
        build_from(partial(collection, CubOptions(cub)))


def test_file_is_named_when_the_table_is_missing(cub: Path, build_from: Build) -> None:
    (cub / "CUB_200_2011/attributes/image_attribute_labels.txt").unlink()
    with pytest.raises(DataError, match=r"CUB_200_2011/attributes/image_attribute_labels.txt, there or in CUB_200"):
        build_from(partial(collection, CubOptions(cub)))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("attributes/image_attribute_labels.txt", "", "has no line for 9 of 9 labels"),
        (
            "attributes/image_attribute_labels.txt",
            LABELS.partition("3 2")[0],
            "no line for 2 of 9 labels, the first of image 3, attribute 2: it is cut short",
        ),
        ("attributes/image_attribute_labels.txt", LABELS + "1 1 0 4 2.0\n", "line 10: image 1 and attribute 1 come a"),
        ("train_test_split.txt", "1 0\n2 1\n3 1.0\n", "says '1.0' of image 3, expected 1"),
        ("train_test_split.txt", "1 0\n2 1\n", "says nothing of image 3, expected 1"),
    ],
)
def test_list_is_refused_when_it_leaves_something_open(
    cub: Path, build_from: Build, name: str, content: str, words: str
) -> None:
    (cub / "CUB_200_2011" / name).write_text(content)
    with pytest.raises(DataError, match=words):
        build_from(partial(collection, CubOptions(cub)))


def test_folder_above_is_named_when_the_inner_one_is_given(cub: Path, build_from: Build) -> None:
    with pytest.raises(DataError, match=rf"{cub}/attributes.txt is there: give --source {cub}"):
        build_from(partial(collection, CubOptions(cub / "CUB_200_2011")))
