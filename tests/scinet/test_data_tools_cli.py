"""The commands that look at a data set: what they print, and the status they end with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from scinet import cli
from scinet.texttable import printable, table
from tests.scinet.conftest import CLASSES, MakeShards


class Ended(NamedTuple):
    status: int
    out: str
    err: str


Call = Callable[..., Ended]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """``call("validate", directory)``: a command of ``scinet data``, in this process."""

    def run(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["scinet", "data", *map(str, words)])
        capsys.readouterr()
        status = cli.main()
        return Ended(status, *capsys.readouterr())

    return run


@pytest.fixture
def folder(make_shards: MakeShards) -> Path:
    return make_shards(12).directory


def test_validate_ends_with_zero_when_nothing_is_wrong(call: Call, folder: Path) -> None:
    ended = call("validate", folder, "--jobs", 1)
    assert ended.status == 0
    assert ended.out == f"{folder}: 12 samples, 0 errors, 0 warnings\n"


def test_validate_ends_with_one_and_names_the_fault_when_there_is_an_error(call: Call, folder: Path) -> None:
    (folder / "train-000001.tar").unlink()
    ended = call("validate", folder, "--jobs", 1)
    assert ended.status == 1
    header, first, *_ = ended.out.splitlines()
    assert header.split() == ["level", "count", "finding", "first"]
    assert first.startswith("error")
    assert first.endswith("train-000001.tar")
    assert "Traceback" not in ended.err


def test_validate_ends_with_zero_when_there_are_warnings_only(call: Call, folder: Path) -> None:
    (folder / "old.tar").write_bytes(b"")
    ended = call("validate", folder, "--jobs", 1, "--json")
    assert ended.status == 0
    whole = json.loads(ended.out)
    assert (whole["errors"], whole["warnings"]) == (0, 1)
    assert whole["findings"] == [{"kind": "shard-unlisted", "level": "warning", "count": 1, "examples": ["old.tar"]}]


@pytest.mark.parametrize("words", [("nowhere",), (), ("nowhere", "--jobs", "-1")])
def test_validate_ends_with_two_when_it_is_used_wrongly(call: Call, words: tuple[str, ...]) -> None:
    assert call("validate", *words).status == 2


def test_table_obeys_no_control_letter_of_a_stranger() -> None:
    shown = table(("count", "name"), [("7", "a\x1b[31m\nb\u202e"), ("12", "ü")])
    assert shown == "count  name\n    7  a\\x1b[31m\\nb\\u202e\n   12  ü\n"
    assert len(printable("x" * 999)) == 160


def test_mask_prints_each_class_and_a_written_one_is_found_equal_when_read(
    call: Call, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mask.jsonl"
    made = call("mask", folder, "--known-ratio", 0.5, "--seed", 3, "--out", out)
    assert made.status == 0
    assert [line.split()[0] for line in made.out.splitlines()[:4]] == ["class", *CLASSES]
    assert "6 intervals do not hold 0.5" in made.out
    read = call("mask", folder, "--from", out)
    assert read.status == 0
    assert read.out.splitlines()[:4] == made.out.splitlines()[:4]
    assert call("mask", folder, "--from", out, "--out", tmp_path / "again.jsonl").status == 0
    assert (tmp_path / "again.jsonl").read_bytes() == out.read_bytes()


def test_mask_of_a_paper_is_compared_with_the_shards(call: Call, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "theirs.csv"
    # truth of train-0000: cat present, dog absent, owl unknown
    path.write_text("id,cat,dog,owl\ntrain-0000,0,,1\nghost\x1b,1,0,\n")
    ended = call("mask", folder, "--from", path)
    assert ended.status == 1
    assert "samples of the split that the mask does not have: 11 ('train-0001', 'train-0002'" in ended.out
    assert "no split has: 1 ('ghost\\x1b')" in ended.out
    assert "contradict the shards: 1 ('train-0000' 'cat': negative in the mask, positive in the shards)" in ended.out
    assert "do not know: 1 ('train-0000' 'owl': positive in the mask, unknown in the shards)" in ended.out
    refused = call("mask", folder, "--from", path, "--out", tmp_path / "mine.jsonl")
    assert refused.status == 1
    assert "11 of 12 samples are missing" in refused.err
    assert not (tmp_path / "mine.jsonl").exists()


def test_mask_says_everything_as_json(call: Call, folder: Path) -> None:
    whole = json.loads(call("mask", folder, "--known-ratio", 0, "--json").out)
    assert whole["num_outside"] == 0
    assert whole["num_outside_expected"] == pytest.approx(0.3)
    assert [row["positives"]["of"] for row in whole["classes"]] == [4, 4, 4]


def test_mask_shows_each_ratio_and_what_is_wrong_when_labels_are_drawn_unevenly(call: Call, folder: Path) -> None:
    words = ("--known-ratio", 0.5, "--class-ratio-spread", 1, "--annotated-classes", 0.7, "--flipped-labels", 0.5)
    whole = json.loads(call("mask", folder, *words, "--json").out)
    rows = {row["class"]: row for row in whole["classes"]}
    asked = [rows[name]["asked_ratio"] for name in CLASSES]
    assert asked[2] == 0
    assert asked[0] != asked[1]
    assert (rows["owl"]["positives"]["known"], rows["owl"]["negatives"]["known"]) == (0, 0)
    ended = call("mask", folder, *words)
    assert ended.status == 0
    header, cat, *_ = ended.out.splitlines()
    assert header.split()[:2] == ["class", "asked"]
    assert cat.split()[:2] == ["cat", f"{asked[0]:.3f}"]
    flipped, known = (
        [sum(row[sign][key] for row in rows.values()) for sign in ("positives", "negatives")]
        for key in ("flipped", "known")
    )
    assert sum(flipped) > 0
    shown = known[0] - flipped[0] + flipped[1]
    assert (
        f"flipped: {flipped[0]} of {known[0]} known positives, {flipped[1]} of {known[1]} known negatives, so that "
        f"{flipped[1] / shown:.2%} of the {shown} shown as positive are wrong"
    ) in ended.out


def test_mask_file_says_no_ratio_when_classes_have_their_own(call: Call, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "mask.jsonl"
    assert call("mask", folder, "--known-ratio", 0.5, "--annotated-classes", 0.4, "--out", out).status == 0
    assert json.loads(out.read_text().splitlines()[0])["known_ratio"] is None
    read = call("mask", folder, "--from", out)
    assert read.status == 0
    assert "intervals" not in read.out.partition("\n")[2]


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--known-ratio", 0.1, "--flipped-labels", 0.1, "--out", "mask.jsonl"),
        ("--single-positive", "--flipped-labels", 0.1),
        ("--from", "x", "--annotated-classes", 0.5),
        ("--known-ratio", 0.1, "--single-positive"),
        ("--known-ratio", 2),
        ("--from", "nowhere.jsonl"),
        ("--known-ratio", 0.1, "--negative", "0"),
        ("--single-positive", "--from", "x"),
    ],
)
def test_mask_ends_with_two_when_it_is_used_wrongly(call: Call, folder: Path, words: tuple[object, ...]) -> None:
    assert call("mask", folder, *words).status == 2


def test_inspect_prints_the_card_and_writes_the_page(call: Call, folder: Path, tmp_path: Path) -> None:
    ended = call("inspect", folder, "--out", tmp_path / "page.html", "--samples", 3)
    assert ended.status == 0
    assert ended.out.splitlines()[1].split()[:4] == ["train", "12", "1.00", "50.00%"]
    for line in ("most frequent: cat 4, dog 4, owl 4", "name: test", "missing images: none"):
        assert line in ended.out
    assert (tmp_path / "page.html").is_file()
    assert call("inspect", folder / "nowhere").status == 2


def test_estimate_prints_disk_reading_and_state(call: Call) -> None:
    ended = call("estimate", "--samples", 100000, "--classes", 80, "--ranks", 8, "--bank-size", 4096)
    assert ended.status == 0
    for words in ("782 shards", "shuffle windows: 2 lanes x 513", "100,000 x 80 fp32", "bank, 4,096 rows of width 512"):
        assert words in ended.out


def test_estimate_takes_the_sizes_of_a_data_set_that_is_built(call: Call, folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"data:\n  path: {folder}\n")
    ended = call("estimate", "--config", config)
    assert ended.status == 0
    assert ended.out.startswith("12 samples, 3 classes, 1.00 positives and 1.00 negatives an image")


@pytest.mark.parametrize(
    "words",
    [(), ("--samples", 3), ("--samples", 9, "--classes", 2), ("--config", "nowhere.yaml"), ("--samples", 0)],
)
def test_estimate_ends_with_two_when_it_is_used_wrongly(call: Call, words: tuple[object, ...]) -> None:
    assert call("estimate", *words).status == 2
