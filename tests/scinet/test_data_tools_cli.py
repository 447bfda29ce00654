"""The commands that look at a data set: what they print, and the status they end with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from scinet import cli
from scinet.data_tools_cli import printable, table
from tests.scinet.conftest import MakeShards


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
