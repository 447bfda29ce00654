"""The runner of planted faults on a tree of two files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.run import read_lists

RUN = Path(__file__).parent / "run.py"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tests/faults").mkdir(parents=True)
    (tmp_path / "tests/test_tiny.py").write_text("import tiny\ndef test_sum():\n    assert tiny.total([2, 3]) == 5\n")
    (tmp_path / "tiny.py").write_text("def total(numbers):\n    return sum(numbers)  # of all\n")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "-C", tmp_path, "add", "tiny.py", "tests/test_tiny.py"], check=True)
    return tmp_path


def run(tree: Path, *changes: tuple[str, str], words: str = "") -> subprocess.CompletedProcess[str]:
    entry = "[[fault]]\nname = 'fault {}'\nfile = 'tiny.py'\nold = '{}'\nnew = \"{}\"\ntests = ['tests/test_tiny.py']\n"
    lines = [entry.format(number, old, new) for number, (old, new) in enumerate(changes)]
    (tree / "tests/faults/tiny.toml").write_text("\n".join(lines))
    command = [sys.executable, RUN, "--root", tree, "--jobs", "1", *([words] if words else [])]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=120)


def test_lists_fit_the_code_as_it_is() -> None:
    root = RUN.parents[2]
    listed = subprocess.run(["git", "-C", root, "ls-files"], capture_output=True, text=True, check=True)
    assert len(read_lists(root, listed.stdout.splitlines())) >= 60


def test_each_fault_is_told_apart_when_one_is_caught_one_survives_and_one_breaks_the_import(tree: Path) -> None:
    ended = run(tree, ("sum(", "max("), ("of all", "of some"), ("def total", "import absent\\ndef total"))
    lines = ended.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["caught", "SURVIVED", "BROKEN", "1"], ended
    assert "tests/test_tiny.py::test_sum" in lines[0]
    assert "absent" in lines[2]
    assert ended.returncode == 1


def test_the_status_is_zero_when_the_only_fault_asked_for_is_caught(tree: Path) -> None:
    ended = run(tree, ("sum(", "max("), ("of all", "of some"), words="fault 0")
    assert ended.returncode == 0, ended


def test_a_list_is_refused_when_its_old_text_is_not_there(tree: Path) -> None:
    ended = run(tree, ("product(", "max("))
    assert ended.returncode == 2
    assert "tiny.toml, fault 'fault 0': the old text occurs 0 times in tiny.py, expected once" in ended.stderr


def test_nothing_is_planted_when_a_named_test_fails_already(tree: Path) -> None:
    (tree / "tiny.py").write_text("def total(numbers):\n    return min(numbers)\n")
    ended = run(tree, ("min(", "max("))
    assert ended.returncode == 2
    assert "without any fault, tests/test_tiny.py" in ended.stderr
