"""Builds as real processes: killed, interrupted, doubled, robbed of a worker; nothing is lost or left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
USAGE, FAILURE, INTERRUPTED = 2, 1, 130

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(launch: Any) -> Iterator[Start]:
    """``start(out, jobs=2)``: begin to build scenes, in a process group of its own."""
    begun: list[subprocess.Popen[str]] = []

    def run(out: Path, *more: object, jobs: int = 2) -> subprocess.Popen[str]:
        words = ["data", "build", "scenes", "--out", out, "--count", 240, "--image-size", 96, "--shard-samples", 10]
        begun.append(
            subprocess.Popen(
                [sys.executable, "-m", "scinet.cli", *map(str, [*words, "--jobs", jobs, *more])],
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return begun[-1]

    yield run
    for process in begun:
        process.kill()
        process.wait()


def _reports(out: Path) -> list[Path]:
    return sorted((out.parent / f".{out.name}.building/reports").glob("*.json"))


def _wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


def _descendants(pid: int) -> set[int]:
    try:
        children = {int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except OSError:
        return set()
    return children.union(*(_descendants(child) for child in children))


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _error(process: subprocess.Popen[str]) -> str:
    _, text = process.communicate(timeout=120)
    assert "Traceback" not in text, text
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, text
    return errors[0]


@pytest.mark.multiprocess
def test_killed_build_goes_on_and_ends_as_an_unbroken_one(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    first = start(out)
    _wait_for(lambda: len(_reports(out)) >= 3)
    workers = _descendants(first.pid)
    first.kill()
    first.communicate()
    _wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 20)
    finished = {report.stem: (out.parent / ".scenes.building/whole" / report.stem).stat() for report in _reports(out)}
    assert 3 <= len(finished) < 24
    assert not out.exists()
    assert start(out).wait(timeout=240) == 0
    for name, before in finished.items():
        after = (out / name).stat()
        assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    unbroken = tmp_path / "unbroken"
    assert start(unbroken, jobs=1).wait(timeout=240) == 0
    assert _content(out) == _content(unbroken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenes", "unbroken"]


@pytest.mark.multiprocess
def test_second_builder_is_refused_and_ctrl_c_keeps_what_is_finished(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    first = start(out)
    _wait_for(lambda: len(_reports(out)) >= 1)
    second = start(out)
    assert "another process is building" in _error(second)
    assert second.returncode == USAGE
    os.killpg(first.pid, signal.SIGINT)
    error = _error(first)
    assert first.returncode == INTERRUPTED
    assert f"{len(_reports(out))} finished shards are kept in {out.parent / '.scenes.building'}" in error
    assert not out.exists()
    other = start(out, "--seed", 1)
    assert "another choice of options" in _error(other)
    assert other.returncode == USAGE


@pytest.mark.multiprocess
def test_death_of_a_worker_ends_in_a_sentence(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    first = start(out)
    _wait_for(lambda: len(_reports(out)) >= 1)
    # the fork server's children are the workers
    workers = [pid for pid in _descendants(first.pid) if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(max(workers), signal.SIGKILL)
    assert "a process that wrote shards died" in _error(first)
    assert first.returncode == FAILURE
    assert len(_reports(out)) >= 1


def test_unknown_version_of_nuswide_is_refused_and_none_is_guessed(scinet: Any, tmp_path: Path) -> None:
    result = scinet("data", "build", "nuswide", "--source", tmp_path, "--out", tmp_path / "out")
    assert result.status == USAGE
    assert "--version" in result.err


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["voc2007"], ["the list of train images", "VOCdevkit/VOC2007/ImageSets/Main/trainval.txt", "VOCtrainval_06"]),
        (["voc2012"], ["VOCdevkit/VOC2012/ImageSets/Main/train.txt", "VOCtrainval_11-May-2012.tar"]),
        (["coco2014"], ["annotations/instances_train2014.json", "annotations_trainval2014.zip"]),
        (["coco2017"], ["annotations/instances_train2017.json", "annotations_trainval2017.zip"]),
        (["nuswide", "--version", "asl"], ["ConceptsList/Concepts81.txt", "ConceptsList.zip"]),
        (["cub"], ["attributes.txt", "CUB_200_2011.tgz"]),
        (["openimages"], ["oidv6-classes-trainable.txt"]),
    ],
    ids=lambda value: value[0],
)
def test_first_official_file_is_named_when_the_source_is_empty(
    scinet: Any, tmp_path: Path, words: list[str], names: list[str]
) -> None:
    (tmp_path / "raw").mkdir()
    result = scinet("data", "build", *words, "--source", tmp_path / "raw", "--out", tmp_path / "out")
    assert result.status == FAILURE
    for name in names:
        assert name in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
