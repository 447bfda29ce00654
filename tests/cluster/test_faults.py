"""Faults meet the processes that they are meant for, and no others."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scinet_cluster import faults
from scinet_cluster.faults import MARK, Fault, Processes

pytestmark = pytest.mark.multiprocess

MARKED = "of-this-test"
LOADER = "import os, time; os.fork(); time.sleep(60)"
WRITER = """
import sys, time
print("begun", flush=True)
while True:
    try:
        with open(sys.argv[1], "wb", buffering=0) as file: file.write(bytes(100))
        print("written", flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
    time.sleep(0.01)
"""
LAUNCHER = """
import os, subprocess, sys, time
for rank in range(2):
    subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, "RANK": str(rank)})
time.sleep(60)
"""


def _python(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    variables = {key: value for key, value in os.environ.items() if key != "RANK"} | environment
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(words, env=variables, stdout=subprocess.PIPE, text=True)


def _settled(number: int) -> Processes:
    """Return what lives once it is so many; a killed process may take a moment to die."""
    end = time.monotonic() + 30
    while len(found := faults.processes(MARKED).everyone) != number:
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return faults.processes(MARKED)


@pytest.fixture
def launcher() -> Iterator[subprocess.Popen[str]]:
    """A marked launcher of two ranks, each with a process of its own, once all of them live."""
    stranger = _python(LOADER, RANK="0")
    launcher = _python(LAUNCHER, LOADER, **{MARK: MARKED})
    _settled(5)
    yield launcher
    assert stranger.poll() is None
    os.kill(stranger.pid, signal.SIGKILL)
    faults.kill_all(MARKED)
    launcher.wait()
    stranger.wait()


def test_ranks_and_loaders_are_told_apart(launcher: subprocess.Popen[str]) -> None:
    found = faults.processes(MARKED)
    assert len(found.ranks) == len(found.loaders) == 2
    assert sorted({launcher.pid, *found.ranks, *found.loaders}) == found.everyone


@pytest.mark.parametrize(
    ("fault", "status"), [(Fault.kill_launcher, -signal.SIGKILL), (Fault.terminate, -signal.SIGTERM)]
)
def test_launcher_is_ended(launcher: subprocess.Popen[str], fault: Fault, status: int) -> None:
    assert faults.inflict(fault, launcher.pid, MARKED, random.Random(0)) is fault
    assert launcher.wait(10) == status
    faults.kill_all(MARKED)
    assert _settled(0).everyone == []


@pytest.mark.parametrize("fault", [Fault.kill_rank, Fault.kill_loader])
def test_one_process_is_killed(launcher: subprocess.Popen[str], fault: Fault) -> None:
    before = faults.processes(MARKED)
    assert faults.inflict(fault, launcher.pid, MARKED, random.Random(0)) is fault
    after = _settled(len(before.everyone) - 1)
    kind = "ranks" if fault is Fault.kill_rank else "loaders"
    assert len(set(getattr(before, kind)) - set(after.everyone)) == 1


def test_launcher_is_killed_where_there_is_no_rank_yet() -> None:
    alone = _python("import time; time.sleep(60)", **{MARK: f"{MARKED}-alone"})
    assert faults.inflict(Fault.hang, alone.pid, f"{MARKED}-alone", random.Random(0)) is Fault.kill_launcher
    assert alone.wait(10) == -signal.SIGKILL


def test_disk_is_full_for_ranks_until_it_is_not(tmp_path: Path) -> None:
    mark = f"{MARKED}-writer"
    rank = _python(WRITER, tmp_path / "file", RANK="0", **{MARK: mark})
    assert rank.stdout is not None
    assert rank.stdout.readline() == "begun\n"
    faults.inflict(Fault.fill_disk, rank.pid, mark, random.Random(0))
    assert "File too large\n" in {rank.stdout.readline() for _ in range(20)}
    faults.limit_files(mark, -1)
    lines = [rank.stdout.readline() for _ in range(50)]
    assert lines[-1] == "written\n"
    faults.kill_all(mark)
    rank.wait()
