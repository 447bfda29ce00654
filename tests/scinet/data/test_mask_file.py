"""A mask that is written is read back, one that is wrong is refused by line, and an ambiguous one by its codes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scinet.data import mask_file
from scinet.data.card import DataCard
from scinet.data.mask_file import Header, MaskTable, Row
from scinet.errors import ConfigError, DataError
from tests.scinet.conftest import CLASSES, MakeShards

HEADER = Header(CLASSES, "tiny", "train", "0" * 64, 2, 0.5, False, 7)
ROWS = [Row("a", (0,), (1, 2)), Row("ü/b.jpg", (), ())]


def _read(path: Path, negative: str | None = None, unknown: str | None = None) -> list[tuple[object, ...]]:
    return [tuple(row)[:3] for row in mask_file.read(path, CLASSES, negative=negative, unknown=unknown)]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    mask_file.write(tmp_path / "mask.jsonl", HEADER, ROWS)
    return tmp_path / "mask.jsonl"


def test_mask_is_read_back_when_it_was_written(written: Path) -> None:
    assert mask_file.read_header(written) == HEADER
    assert _read(written) == [tuple(row)[:3] for row in ROWS]
    assert [path.name for path in written.parent.iterdir()] == ["mask.jsonl"]
    table = mask_file.load(written)
    assert table.observe("a").tolist() == [1, -1, -1]
    assert table.observe("ü/b.jpg").tolist() == [0, 0, 0]
    with pytest.raises(DataError, match="no sample 'c'"):
        table.observe("c")


def test_mask_is_not_written_when_the_file_exists_or_the_rows_fail(written: Path, tmp_path: Path) -> None:
    before = written.read_bytes()
    with pytest.raises(ConfigError, match="--out"):
        mask_file.write(written, HEADER, ROWS)
    assert written.read_bytes() == before

    def failing() -> object:
        yield ROWS[0]
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        mask_file.write(tmp_path / "other.jsonl", HEADER, failing())  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["mask.jsonl"]
    with pytest.raises(ConfigError, match="cannot write"):
        mask_file.write(tmp_path / "no" / "mask.jsonl", HEADER, ROWS)


def test_classes_are_taken_by_name_when_the_file_has_another_order(tmp_path: Path) -> None:
    mask_file.write(tmp_path / "m.jsonl", Header(("owl", "cat", "dog"), "", "", "", 1, None, False, None), ROWS)
    assert _read(tmp_path / "m.jsonl") == [("a", (2,), (0, 1)), ("ü/b.jpg", (), ())]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("cat", "dgo", "owl"), "'dgo' is not in the data card; did you mean 'dog'"),
        (("cat", "owl"), "has 2 classes, the data card 3: 'dog' is missing"),
        (("cat", "dog", "owl", "owl"), "more than once"),
    ],
)
def test_classes_are_named_when_they_are_not_the_cards(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    mask_file.write(tmp_path / "m.jsonl", Header(names, "", "", "", 1, None, False, None), [])
    with pytest.raises(DataError, match=words):
        _read(tmp_path / "m.jsonl")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 3: no JSON"),
        ("[]", "line 3: a list"),
        ('{"id": "x", "positives": [0]}', "line 3: no 'negatives'"),
        ('{"id": "x", "positives": [3], "negatives": []}', r"line 3: class 3 is out of range"),
        ('{"id": "x", "positives": [0], "negatives": [0]}', r"line 3: class 0 is positive and negative"),
        ('{"id": "x", "positives": ["cat"], "negatives": []}', "line 3: 'positives' is no list"),
        ("[" * 100_000, "line 3: (nested|no JSON)"),
    ],
)
def test_line_is_named_when_it_is_wrong(tmp_path: Path, line: str, words: str) -> None:
    mask_file.write(tmp_path / "m.jsonl", HEADER, ROWS[:1])
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=words):
        _read(tmp_path / "m.jsonl")


def test_id_is_refused_when_it_comes_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lines 2 and 9 are about the same sample"):
        MaskTable([*(row._replace(line=n) for n, row in enumerate(ROWS, start=2)), Row("a", (), (), 9)], 3, tmp_path)


@pytest.mark.parametrize(
    "first",
    [
        "",
        "{}",
        "[" * 100_000,
        '{"format": "scinet-mask-1", "class_names": [], "seed": 1e400}',
        '{"format": "other"}',
        "[1]",
        '{"format": "scinet-mask-1"}',
    ],
)
def test_file_is_refused_when_its_header_is_none(tmp_path: Path, first: str) -> None:
    (tmp_path / "m.jsonl").write_text(first + "\n")
    with pytest.raises(DataError, match="is no mask"):
        mask_file.read_header(tmp_path / "m.jsonl")


def test_nearest_file_is_named_when_it_does_not_exist(written: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean '.*mask\.jsonl'"):
        mask_file.load(written.with_name("masc.jsonl"))


def test_bare_matrix_is_refused_because_it_names_no_image(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which row is which image"):
        _read(tmp_path / "mask.npy")


CSV = {
    "blanks": ("id,cat,dog,owl\na,1,0,\nb,,,1\n", None, None, [("a", (0,), (1,)), ("b", (2,), ())]),
    "columns in another order": ("id,owl,cat,dog\na,1,0,\n", None, None, [("a", (2,), (0,))]),
    "-1 absent, 0 unknown": ("id,cat,dog,owl\na,1,-1,0\n", "-1", "0", [("a", (0,), (1,))]),
    "-1 unknown, 0 absent": ("id,cat,dog,owl\na,1,-1,0\n", "0", "-1", [("a", (0,), (2,))]),
    "0 unknown": ("id,cat,dog,owl\na,1,0,0\n", None, "0", [("a", (0,), ())]),
    "0 absent": ("id,cat,dog,owl\na,1,0,0\n", "0", None, [("a", (0,), (1, 2))]),
}


@pytest.mark.parametrize("case", CSV)
def test_dense_table_is_read_when_its_codes_are_clear(tmp_path: Path, case: str) -> None:
    text, negative, unknown, expected = CSV[case]
    (tmp_path / "m.csv").write_text(text)
    assert _read(tmp_path / "m.csv", negative, unknown) == expected


@pytest.mark.parametrize(
    ("cells", "error", "words"),
    [
        ("1,-1,0", ConfigError, "can mean absent or not annotated"),
        ("1,-1,", ConfigError, "'-1' can mean absent or not annotated"),
        ("1,0,0", ConfigError, "--unknown 0"),
        ("1,2,", DataError, "line 2: label '2'"),
        ("1,", DataError, "line 2 has 3 cells, the header has 4"),
    ],
)
def test_dense_table_is_refused_when_its_codes_are_not_clear(
    tmp_path: Path, cells: str, error: type[Exception], words: str
) -> None:
    (tmp_path / "m.csv").write_text(f"id,cat,dog,owl\na,{cells}\n")
    with pytest.raises(error, match=words):
        _read(tmp_path / "m.csv")


@pytest.mark.parametrize("content", [b"id,cat,dog,owl\n", b"", b"\xff\xfe", b"id,cat,dog,owl\na,1,\0,\n"])
def test_dense_table_is_refused_when_it_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"m\.csv"):
        _read(tmp_path / "m.csv")


ids = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=20)
labels = st.lists(st.sampled_from([-1, 0, 1]), min_size=3, max_size=3)


@given(st.dictionaries(ids, labels, max_size=30))
@settings(deadline=None, max_examples=50)
def test_any_rows_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, list[int]]) -> None:
    path = tmp_path_factory.mktemp("mask") / "mask.jsonl"
    signs = {name: np.array(row) for name, row in rows.items()}
    mask_file.write(
        path,
        HEADER,
        (
            Row(name, tuple(np.flatnonzero(row == 1).tolist()), tuple(np.flatnonzero(row == -1).tolist()))
            for name, row in signs.items()
        ),
    )
    table = mask_file.load(path)
    assert len(table) == len(rows)
    assert {name: table.observe(name).tolist() for name in rows} == rows


def test_mask_covers_when_every_training_sample_is_there(tmp_path: Path, make_shards: MakeShards) -> None:
    card: DataCard = make_shards(12)
    path = tmp_path / "mask.jsonl"
    rows = [Row(f"train-{number:04d}", (0,), ()) for number in range(12)]
    mask_file.write(path, HEADER, rows)
    mask_file.check_covers(path, card)

    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *lines[3:]]) + "\n")
    with pytest.raises(DataError, match="no sample 'train-0000'; 2 of 12 training samples are missing"):
        mask_file.check_covers(path, card)
    # shards elsewhere are not downloaded for it: their samples are looked up as they come
    mask_file.check_covers(path, dataclasses.replace(card, url="http://127.0.0.1:1/set"))

    tree = json.loads(lines[0]) | {"class_names": ["dog", "cat", "owl"]}
    path.write_text("\n".join([json.dumps(tree), *lines[1:]]) + "\n")
    with pytest.raises(DataError, match="another order"):
        mask_file.check_covers(path, card)
