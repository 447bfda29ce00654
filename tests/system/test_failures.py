"""One rank fails, each process started by hand: what the others end with, in time and in one sentence."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from scinet import running, train
from scinet.distributed import Ranks, sum_over_ranks
from scinet.errors import DataError, LoaderLost
from tests import ranks as forked
from tests.ranks import Rank

pytestmark = [pytest.mark.multiprocess, pytest.mark.alone]

TIMEOUT_S = 6
ENDS_S = 60  # generous, for a busy machine; unguarded, some of these take a quarter of an hour
Start = Callable[..., list[Rank]]


def _fails(how: str) -> None:
    if how in ("data", "data-asleep"):
        raise DataError("a broken shard")
    if how == "loader":
        raise LoaderLost("a loader process was killed")
    os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])


def _train(failing: int, how: str, words: list[str]) -> int:
    """Run the training command, which is one collective that one rank never enters, and return its exit status."""

    def run(_options: Any, ranks: Ranks, *_: Any) -> dict[str, Any]:
        sum_over_ranks(torch.ones(1), ranks)  # all have met
        if ranks.rank == failing:
            _fails(how)
        if how == "data-asleep":
            time.sleep(300)  # as in NCCL, which does not notice that a rank has ended
        sum_over_ranks(torch.ones(1), ranks)
        return {}

    with mock.patch.object(running, "_run", run):
        return train.main(words)


@pytest.fixture
def start(small: tuple[str, ...], tmp_path: Path) -> Iterator[Start]:
    """``start(ranks, world_size, failing, how)``: start some ranks of a training in which one fails."""
    started: list[Rank] = []

    def begin(ranks: range, world_size: int, failing: int, how: str) -> list[Rank]:
        words = [*small, f"output={tmp_path}", f"train.collective_timeout_s={TIMEOUT_S}"]
        started.extend(forked.start(_train, failing, how, words, size=world_size, ranks=ranks))
        return started

    yield begin
    for rank in started:
        rank.kill()


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
    ended = [rank.end(ENDS_S) for rank in start(range(2), 2, failing, how)]
    assert [each[0] for each in ended] == [status, status], ended
    (line,) = _errors([line for _, lines in ended for line in lines])
    assert says in line


@pytest.mark.parametrize(("failing", "how"), [(0, "killed"), (1, "killed"), (0, "stopped")])
def test_other_rank_ends_so_that_it_may_start_again_when_one_is_lost(start: Start, failing: int, how: str) -> None:
    ranks = start(range(2), 2, failing, how)
    status, lines = ranks[1 - failing].end(ENDS_S)
    assert status == 142, lines
    (line,) = _errors(lines)
    assert "another rank was lost" in line
    assert "--resume auto" in line


def test_rank_says_for_whom_it_waited_when_they_never_come(start: Start) -> None:
    (rank,) = start(range(1, 2), 2, 0, "data")
    status, lines = rank.end(ENDS_S)
    assert status == 142, lines
    (line,) = _errors(lines)
    assert "rank 1 on " in line
    assert f"limit {TIMEOUT_S} s" in line
    assert "the 2 ranks that meet at 127.0.0.1:" in line
