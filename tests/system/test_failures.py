"""One rank fails, each process started by hand: what the others end with, in time and in one sentence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scinet_cluster.addresses import free_port

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

WORKER = Path(__file__).with_name("worker_failures.py")
TIMEOUT_S = 15
ENDS_S = 100  # generous: with imports on a busy machine; unguarded, some of these take a quarter of an hour
Start = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def start(small: tuple[str, ...], tmp_path: Path) -> Iterator[Start]:
    """``start(ranks, world_size, failing, how)``: start some ranks of a training in which one fails."""
    started: list[subprocess.Popen[str]] = []

    def begin(ranks: range, world_size: int, failing: int, how: str) -> list[subprocess.Popen[str]]:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
        shared["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # the command sets it, but the worker imports torch before
        for rank in ranks:
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank - ranks.start)}
            words = [sys.executable, WORKER, str(failing), how, *small, f"output={tmp_path}"]
            words += [f"train.collective_timeout_s={TIMEOUT_S}"]
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(words, env=environment, stderr=pipe, stdout=subprocess.DEVNULL, text=True))
        return started

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def _end(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Return the exit status and the lines on standard error."""
    told = process.communicate(timeout=ENDS_S)[1]
    return process.returncode, told.splitlines()


def _errors(lines: list[str]) -> list[str]:
    assert all(line.startswith("error: ") for line in lines), "sentences only, no stack"
    return lines


@pytest.mark.parametrize(
    ("failing", "how", "status", "says"),
    [
        (0, "data", 1, "a broken shard"),
        (1, "data", 1, "a broken shard"),
        (0, "data-asleep", 1, "a broken shard"),
        (1, "loader", 142, "a loader process was killed"),
    ],
)
def test_all_ranks_end_alike_and_one_speaks_when_one_fails(
    start: Start, failing: int, how: str, status: int, says: str
) -> None:
    ended = [_end(process) for process in start(range(2), 2, failing, how)]
    assert [each[0] for each in ended] == [status, status], ended
    (line,) = _errors([line for _, lines in ended for line in lines])
    assert says in line


@pytest.mark.parametrize(("failing", "how"), [(0, "killed"), (1, "killed"), (0, "stopped")])
def test_other_rank_ends_so_that_it_may_start_again_when_one_is_lost(start: Start, failing: int, how: str) -> None:
    processes = start(range(2), 2, failing, how)
    status, lines = _end(processes[1 - failing])
    assert status == 142, lines
    (line,) = _errors(lines)
    assert "another rank was lost" in line
    assert "--resume auto" in line
    processes[failing].send_signal(signal.SIGKILL)


def test_rank_says_for_whom_it_waited_when_they_never_come(start: Start) -> None:
    (process,) = start(range(1, 2), 2, 0, "data")
    status, lines = _end(process)
    assert status == 142, lines
    (line,) = _errors(lines)
    assert "rank 1 on " in line
    assert f"limit {TIMEOUT_S} s" in line
    assert "the 2 ranks that meet at 127.0.0.1:" in line
