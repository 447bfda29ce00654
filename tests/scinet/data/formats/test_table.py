"""A label table says what it says; where it could mean two things it is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scinet.data.building import BuildOptions, build
from scinet.data.card import DataCard
from scinet.data.formats.table import collection, read
from scinet.data.formats.table_rows import Row, TableOptions
from scinet.data.records import Record
from scinet.data.stream import Order, SampleStream
from scinet.errors import ConfigError, DataError, ScinetError
from tests.scinet.conftest import MakeImage


@pytest.fixture
def images(tmp_path: Path, make_image: MakeImage) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for number in range(6):
        (folder / f"im{number}.png").write_bytes(make_image(number))
    (folder / "sub" / "im.jpg").write_bytes(make_image(9, "JPEG"))
    return folder


def _options(
    images: Path, text: str, name: str = "labels.csv", classes: str | None = None, **given: Any
) -> TableOptions:
    path = images.parent / name
    path.write_text(text, encoding="utf-8")
    class_list = None
    if classes is not None:
        class_list = images.parent / "classes.txt"
        class_list.write_text(classes, encoding="utf-8")
    return TableOptions(path, images, classes=class_list, is_jsonl=name.endswith(".jsonl"), **given)


def _labels(options: TableOptions) -> list[list[int]]:
    names, rows = read(options)
    signs = [[0] * len(names) for _ in rows]
    for row, line in zip(rows, signs, strict=True):
        for sign, places in ((1, row.positives), (-1, row.negatives)):
            for place in places:
                line[place] = sign
    return signs


def _records(options: TableOptions) -> list[Record]:
    return list(collection(options).records())


def _built(options: TableOptions, **given: Any) -> DataCard:
    out = options.images.parent / "out"
    return build(lambda _: collection(options), out, BuildOptions(holdout=0, **given), lambda *_: None)


def _refusal(options: TableOptions, kind: type[ScinetError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        _built(options)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == kind.exit_status
    return str(caught.value)


CODES = "file,cat,dog\nim0.png,{},{}\nim1.png,{},{}\n"


@pytest.mark.parametrize(
    ("codes", "given", "expected"),
    [
        (("1", "0", "0", "1"), {}, [[1, -1], [-1, 1]]),
        (("1", "", "0", "1"), {}, [[1, 0], [-1, 1]]),
        (("1", "", "", "1"), {}, [[1, 0], [0, 1]]),
        ((" 1", "0 ", "", "1"), {}, [[1, -1], [0, 1]]),
        (("1", "0", "", "1"), {"unknown": "0"}, [[1, 0], [0, 1]]),
        (("1", "-1", "-1", "1"), {"negative": "-1"}, [[1, -1], [-1, 1]]),
        (("1", "-1", "-1", "1"), {"unknown": "-1"}, [[1, 0], [0, 1]]),
        (("1", "-1", "0", "1"), {"negative": "-1", "unknown": "0"}, [[1, -1], [0, 1]]),
        (("1", "-1", "0", "1"), {"negative": "0", "unknown": "-1"}, [[1, 0], [-1, 1]]),
        (("1", "no", "?", "1"), {"negative": "no", "unknown": "?"}, [[1, -1], [0, 1]]),
    ],
)
def test_codes_mean_what_they_say_when_clear(
    images: Path, codes: tuple[str, ...], given: dict[str, str], expected: list[list[int]]
) -> None:
    assert _labels(_options(images, CODES.format(*codes), **given)) == expected


@pytest.mark.parametrize("codes", [("1", "-1", "0", "1"), ("1", "-1", "-1", "1"), ("1", "-1", "", "0")])
def test_codes_are_refused_when_minus_one_could_mean_two_things(images: Path, codes: tuple[str, ...]) -> None:
    message = _refusal(_options(images, CODES.format(*codes)), ConfigError)
    assert "--negative" in message
    assert "--unknown" in message
    assert "labels.csv" in message


@pytest.mark.parametrize("code", ["2", "yes", "1.0", "-"])
def test_line_is_named_when_a_code_is_strange(images: Path, code: str) -> None:
    message = _refusal(_options(images, CODES.format("1", "0", "1", code)))
    assert "line 3" in message
    assert f"'{code}'" in message


def test_rows_keep_their_place_and_line_when_read(images: Path) -> None:
    names, rows = read(_options(images, "file,cat,dog,owl\nim0.png,0,1,1\nsub/im.jpg,1,0,0\n"))
    assert names == ["cat", "dog", "owl"]
    assert list(rows) == [Row("im0.png", (1, 2), (0,), 2), Row("sub/im.jpg", (0,), (1, 2), 3)]


def test_columns_follow_the_class_list_when_there_is_one(images: Path) -> None:
    options = _options(images, "file,cat,dog\nim0.png,1,0\n", classes="dog\n\n cat \n")
    names, rows = read(options)
    assert (names, list(rows)) == (["dog", "cat"], [Row("im0.png", (1,), (0,), 2)])


def test_names_are_kept_when_they_hold_commas_quotes_and_other_scripts(images: Path) -> None:
    text = '\ufefffile,"cat, tabby","d""og",図\nim0.png,1,0,1\n'
    names, rows = read(_options(images, text))
    assert names == ["cat, tabby", 'd"og', "図"]
    assert rows[0].positives == (0, 2)


def test_column_is_suggested_when_the_class_list_does_not_know_it(images: Path) -> None:
    message = _refusal(_options(images, "file,cat,dgo\nim0.png,1,0\n", classes="cat\ndog\n"))
    assert "column 'dgo' is not in" in message
    assert "did you mean 'dog'" in message


def test_missing_column_is_named_when_the_class_list_is_longer(images: Path) -> None:
    message = _refusal(_options(images, "file,cat,dog\nim0.png,1,0\n", classes="cat\nowl\ndog\n"))
    assert "has 2 label columns but" in message
    assert "lists 3 classes" in message
    assert "'owl'" in message


@pytest.mark.parametrize("classes", [None, "cat\ndog\n", "cat\ndog\nowl\n"])
def test_column_is_named_when_it_comes_twice(images: Path, classes: str | None) -> None:
    assert "'cat'" in _refusal(_options(images, "file,cat,dog,cat\nim0.png,1,0,0\n", classes=classes))


def test_class_is_named_when_the_list_has_it_twice(images: Path) -> None:
    assert "'cat' more than once" in _refusal(_options(images, "file,cat\nim0.png,1\n", classes="cat\ndog\ncat\n"))


@pytest.mark.parametrize("row", ["im1.png,1", "im1.png,1,0,1", "im1.png"])
def test_line_is_named_when_a_row_is_ragged(images: Path, row: str) -> None:
    message = _refusal(_options(images, f"file,cat,dog\nim0.png,1,0\n{row}\n"))
    assert f"line 3 has {row.count(',') + 1} cells, the header has 3" in message


def test_blank_line_is_passed_over_when_it_ends_the_table(images: Path) -> None:
    assert len(read(_options(images, "file,cat\nim0.png,1\n\n"))[1]) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("file,cat,dog\n", "no row below its header"),
        ("file\nim0.png\n", "no column after its first; its header is 'file'"),
        ("im0.png,1,0\nim1.png,0,1\n", "line 1 holds labels where the class names should be"),
        ("file,cat,\nim0.png,1,0\n", "column 3 has no name in the header"),
        ("file\tcat\nim0.png\t1\n", "is separated by tabs, expected commas"),
        ("file;cat\nim0.png;1\n", "is separated by semicolons, expected commas"),
        ("file,cat\rim0.png,1\r", "its lines end in CR alone"),
        ('file,"cat\ntabby"\nim0.png,1\nim1.png,0,1\n', "line 4 has 3 cells"),
        ("file,cat\nim0.png,1\nim1.png,0\n./im0.png,1\n", "lines 2 and 4 are both about 'im0.png'"),
        ("file,cat\n,1\n", "line 2 names no image"),
        ("file,cat\n../im0.png,1\n", "line 2 names '../im0.png', which is not below"),
        ("file,cat\n/etc/im0.png,1\n", "line 2 names '/etc/im0.png', which is not below"),
    ],
)
def test_table_is_refused_when_it_is_none(images: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=re.escape(words)):
        collection(_options(images, text))


def test_image_is_known_by_one_name_when_its_path_is_absolute(images: Path) -> None:
    (images / "im1.png").rename(images / "..im1.png")
    found = _records(_options(images, f"file,cat\n{images}/sub/im.jpg,1\nsub/../im0.png,0\n..im1.png,1\n"))
    assert {record.sample_id for record in found} == {"sub/im.jpg", "im0.png", "..im1.png"}
    assert all(record.image is not None for record in found)


@pytest.mark.parametrize(
    ("negative", "unknown", "words"),
    [
        ("1", None, "--negative 1: the code 1 means present"),
        (None, "1", "--unknown 1: the code 1 means present"),
        ("o", None, "--negative o: .* has no such code, it has 0, 1"),
        ("0", "0", "say two things about one code"),
    ],
)
def test_codes_are_refused_when_they_make_no_sense(
    images: Path, negative: str | None, unknown: str | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        read(_options(images, "file,cat\nim0.png,1\nim1.png,0\n", negative=negative, unknown=unknown))


def test_separator_is_asked_for_when_names_stand_between_commas(images: Path) -> None:
    text = 'file,tags\nim0.png,"cat,dog"\nim1.png,owl\n'
    with pytest.raises(ConfigError, match=r"line 2: column 'tags' holds commas .* --separator ','"):
        read(_options(images, text, list_column="tags", unknown="unlisted"))
    names, rows = read(_options(images, text, list_column="tags", unknown="unlisted", separator=","))
    assert names == ["cat", "dog", "owl"]
    assert list(rows) == [Row("im0.png", (0, 1), (), 2), Row("im1.png", (2,), (), 3)]


@pytest.mark.parametrize("name", ["labels.csv", "labels.jsonl"])
def test_table_is_refused_when_it_is_not_utf8(images: Path, name: str) -> None:
    options = _options(images, "", name=name)
    options.labels.write_bytes(b'file,k\xe4fer\nim0.png,1\n{"file": "\xe4"}')
    message = _refusal(options)
    assert name in message
    assert "UTF-8" in message


def test_file_is_suggested_when_the_table_is_missing(images: Path) -> None:
    options = _options(images, "x")
    message = _refusal(TableOptions(options.labels.with_name("labelss.csv"), images), ConfigError)
    assert "labelss.csv does not exist" in message
    assert f"did you mean '{options.labels}'" in message


def test_folder_is_named_when_the_images_are_missing(images: Path) -> None:
    options = _options(images, "x")
    assert "imagse does not exist" in _refusal(TableOptions(options.labels, images.with_name("imagse")), ConfigError)


def test_class_list_is_named_when_missing(images: Path) -> None:
    options = _options(images, "file,cat\nim0.png,1\n")
    missing = TableOptions(options.labels, images, classes=images / "none.txt")
    assert "none.txt does not exist" in _refusal(missing, ConfigError)


LISTS = "file,note,tags\nim0.png,x,cat; dog\nim1.png,y,\nim2.png,z, dog ;dog\n"


@pytest.mark.parametrize("mark", [";", "|"])
def test_list_column_is_read_when_what_it_leaves_out_is_absent(images: Path, mark: str) -> None:
    options = _options(images, LISTS.replace(";", mark), list_column="tags", negative="unlisted")
    names, rows = read(options)
    assert names == ["cat", "dog"]
    assert list(rows) == [Row("im0.png", (0, 1), (), 2), Row("im1.png", (), (0, 1), 3), Row("im2.png", (1,), (0,), 4)]


def test_list_column_is_read_when_what_it_leaves_out_is_unknown(images: Path) -> None:
    options = _options(images, LISTS, classes="dog\ncat\nowl\n", list_column="tags", unknown="unlisted")
    names, rows = read(options)
    assert names == ["dog", "cat", "owl"]
    assert list(rows) == [Row("im0.png", (0, 1), (), 2), Row("im1.png", (), (), 3), Row("im2.png", (0,), (), 4)]


@pytest.mark.parametrize("given", [{}, {"negative": "0"}, {"negative": "unlisted", "unknown": "unlisted"}])
def test_list_column_is_refused_when_nobody_says_what_it_leaves_out(images: Path, given: dict[str, str]) -> None:
    message = _refusal(_options(images, LISTS, list_column="tags", **given), ConfigError)
    assert "absent or not annotated" in message
    assert "--negative unlisted or --unknown unlisted" in message


def test_list_column_is_suggested_when_it_is_spelt_otherwise(images: Path) -> None:
    message = _refusal(_options(images, LISTS, list_column="tgas", unknown="unlisted"))
    assert "no column 'tgas'" in message
    assert "did you mean 'tags'" in message


def test_line_is_named_when_a_list_column_separates_in_two_ways(images: Path) -> None:
    text = "file,tags\nim0.png,cat;dog\nim1.png,cat|owl\n"
    assert "line 3: column 'tags' separates names both" in _refusal(
        _options(images, text, list_column="tags", unknown="unlisted")
    )


def test_line_is_named_when_a_list_column_names_another_class(images: Path) -> None:
    message = _refusal(_options(images, LISTS, classes="cat\ndgo\n", list_column="tags", unknown="unlisted"))
    assert "line 2: class 'dog'" in message
    assert "did you mean 'dgo'" in message


def test_rows_are_found_again_when_cells_hold_line_breaks(images: Path) -> None:
    _, rows = read(_options(images, 'file,cat\n"im0.png\n",1\nim1.png,0\n'))
    assert [rows[1], rows[0]] == [Row("im1.png", (), (0,), 4), Row("im0.png", (0,), (), 2)]


def _lines(*records: object) -> str:
    return "".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records)


def test_jsonl_is_read_when_negatives_are_left_out_or_given(images: Path) -> None:
    text = _lines(
        {"file": "im0.png", "positives": ["dog"]}, "", {"file": "im1.png", "positives": [], "negatives": ["cat", "dog"]}
    )
    names, rows = read(_options(images, text, "labels.jsonl"))
    assert names == ["cat", "dog"]
    assert list(rows) == [Row("im0.png", (1,), (), 1), Row("im1.png", (), (0, 1), 3)]


def test_jsonl_counts_a_class_once_when_it_is_named_twice(images: Path) -> None:
    text = _lines({"file": "im0.png", "positives": ["cat", "cat"], "negatives": ["dog", "dog"]})
    assert list(read(_options(images, text, "labels.jsonl"))[1]) == [Row("im0.png", (0,), (1,), 1)]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{not json", "is no JSON: Expecting property name"),
        ("[" * 100_000, "is no JSON: nested too deeply"),
        ("[]", "is no object with 'file', 'positives'"),
        ("3", "is no object with 'file', 'positives'"),
        ("null", "is no object with 'file', 'positives'"),
        ({"positives": ["cat"]}, "has no 'file'"),
        ({"file": "a"}, "has no 'positives'"),
        ({"file": "a", "positives": 3}, "'positives' is not a list of class names"),
        ({"file": "a", "positives": "cat"}, "'positives' is not a list of class names"),
        ({"file": "a", "positives": [], "negatives": "cat"}, "'negatives' is not a list of class names"),
        ({"file": None, "positives": []}, "'file' is not a name"),
        ({"file": "a", "positives": [], "negtives": ["cat"]}, "the key 'negtives'; did you mean 'negatives'?"),
        ('{"file": "a", "positives": ["cat"], "positives": []}', "has the key 'positives' twice"),
        ('{"file": "\\ud800", "positives": []}', "holds half a character"),
    ],
)
def test_line_is_named_when_a_record_is_wrong(images: Path, record: object, words: str) -> None:
    text = _lines({"file": "im0.png", "positives": ["cat"], "filename": "mine"}, record)
    message = _refusal(_options(images, text, "labels.jsonl"))
    assert "labels.jsonl line 2 " in message.replace(":", " ")
    assert words in message


def test_class_is_suggested_when_a_record_names_an_unknown_one(images: Path) -> None:
    text = _lines({"file": "im0.png", "positives": ["catt"]})
    message = _refusal(_options(images, text, "labels.jsonl", classes="cat\ndog\n"))
    assert "line 1: class 'catt'" in message
    assert "did you mean 'cat'" in message


def test_class_is_named_when_it_is_positive_and_negative_at_once(images: Path) -> None:
    text = _lines({"file": "im0.png", "positives": ["cat"], "negatives": ["dog", "cat"]})
    assert "'cat' is positive and negative" in _refusal(_options(images, text, "labels.jsonl"))


def test_image_is_suggested_when_missing(images: Path) -> None:
    message = _refusal(_options(images, "file,cat\nim0.png,1\nim11.png,1\n"))
    assert "line 3" in message
    assert "1 of 2 images are missing" in message
    assert "im11.png of labels.csv line 3" in message
    assert "did you mean" in message
    assert "--missing skip" in message


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n1234"])
def test_image_is_named_when_it_cannot_be_decoded(images: Path, content: bytes) -> None:
    (images / "im1.png").write_bytes(content)
    message = _refusal(_options(images, "file,cat\nim0.png,1\nim1.png,1\n"))
    assert f"im1.png cannot be decoded ({len(content)} bytes)" in message


def test_image_is_named_when_absurdly_large(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert "im0.png" in _refusal(_options(images, "file,cat\nim0.png,1\n"))


def test_image_is_named_when_its_kind_cannot_be_stored(images: Path) -> None:
    Image.new("RGB", (4, 4)).save(images / "im0.gif")
    message = _refusal(_options(images, "file,cat\nim0.gif,1\n"))
    assert "GIF" in message
    assert "--reencode jpeg" in message


def test_bad_images_are_left_out_when_asked(images: Path) -> None:
    (images / "im1.png").write_bytes(b"")
    text = "file,cat\nim0.png,1\nim1.png,1\nnone.png,0\nim2.png,0\n"
    card = _built(_options(images, text), skip_missing=True)
    stored = SampleStream(card, "train", Order(0, 0, 1, 0))
    assert sorted(sample.sample_id for sample in stored) == ["im0.png", "im2.png"]
    assert (card.missing.not_found, card.missing.broken) == (1, 1)


def test_test_split_is_last_after_the_shuffle_when_asked_for(images: Path) -> None:
    text = "file,cat\n" + "".join(f"im{n}.png,{n % 2}\n" for n in range(6))
    orders = []
    for seed in range(4):
        options = _options(images, text, test_samples=2, shuffle_seed=seed)
        made = _records(options)
        assert [sample.split for sample in made] == ["train"] * 4 + ["test"] * 2
        assert sorted(sample.sample_id for sample in made) == [f"im{n}.png" for n in range(6)]
        assert all(sample.positives == ((0,) if int(sample.sample_id[2]) % 2 else ()) for sample in made)
        orders.append([sample.sample_id for sample in made])
        assert orders[-1] == [sample.sample_id for sample in _records(options)]
    assert len({tuple(order) for order in orders}) > 1


def test_test_split_keeps_its_members_when_bad_images_are_left_out(images: Path) -> None:
    text = "file,cat\n" + "".join(f"im{n}.png,1\n" for n in range(6))
    options = _options(images, text, test_samples=2)
    before = {s.sample_id for s in _records(options) if s.split == "test"}
    (images / sorted(before)[0]).unlink()
    there = [s for s in _records(options) if s.image is not None]
    assert {s.sample_id for s in there if s.split == "test"} == before - {sorted(before)[0]}


@pytest.mark.parametrize("number", [1, 5, -1])
def test_test_split_is_refused_when_it_leaves_no_training_row(images: Path, number: int) -> None:
    message = _refusal(_options(images, "file,cat\nim0.png,1\n", test_samples=number), ConfigError)
    assert f"--test {number}" in message


def test_table_comes_back_from_its_shards_when_built(images: Path, tmp_path: Path) -> None:
    options = _options(images, "file,cat,dog\nim0.png,1,0\nsub/im.jpg,,1\n")
    reports: list[tuple[str, int, int]] = []
    settings = BuildOptions(holdout=0, shard_samples=9)
    card = build(lambda _: collection(options), tmp_path / "mine", settings, lambda *seen: reports.append(seen))
    assert card.name == "mine"
    stored = {s.sample_id: s for s in SampleStream(card, "train", Order(0, 0, 1, 0))}
    assert {name: s.truth.tolist() for name, s in stored.items()} == {"im0.png": [1, -1], "sub/im.jpg": [0, 1]}
    assert all(s.image == (images / name).read_bytes() for name, s in stored.items())
    assert reports == [("listed", 2, 2), ("images", 2, 2)]
