"""A run stops where it can go on later, and a rank that hangs is named and does not wait for ever."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from scinet import guard
from scinet.distributed import Ranks
from scinet.errors import PeerLost, Preempted
from scinet.guard import Sentry
from scinet.notes import Failures, Notes

ALONE = Ranks(0, 1, torch.device("cpu"))
HANGING = """
import time, torch
from scinet.distributed import Ranks
from scinet.guard import Sentry
from scinet.notes import Failures, Notes

def wait_for_a_lock_that_never_comes():
    time.sleep(60)

ranks = Ranks(0, 1, torch.device("cpu"))
sentry = Sentry(ranks, Notes(ranks), Failures(), hang_timeout_s=1)
with sentry.on_duty(), sentry.training():
    sentry.mark("step 7")
    wait_for_a_lock_that_never_comes()
"""
LAUNCHED = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(60)
"""
TRAINING = """
import time, torch
from scinet.distributed import Ranks
from scinet.errors import Preempted
from scinet.guard import Sentry
from scinet.notes import Failures, Notes

ranks = Ranks(0, 1, torch.device("cpu"))
sentry = Sentry(ranks, Notes(ranks), Failures(), hang_timeout_s=60)
with sentry.on_duty(), sentry.training():
    print("training", flush=True)
    try:
        while True:
            time.sleep(0.05)
            sentry.boundary("going on")
    except Preempted:
        print("stopped in order", flush=True)
"""


@pytest.fixture
def sentry() -> Iterator[Sentry]:
    sentry = Sentry(ALONE, Notes(ALONE), Failures(), hang_timeout_s=60)
    with sentry.on_duty():
        yield sentry


def test_sigterm_waits_for_the_next_boundary_when_training(sentry: Sentry) -> None:
    with sentry.training():
        signal.raise_signal(signal.SIGTERM)
        sentry.mark("the rest of the step")
        with pytest.raises(Preempted):
            sentry.boundary("going on")


def test_sigterm_stops_at_once_when_nothing_could_be_lost(sentry: Sentry) -> None:
    with pytest.raises(Preempted, match="nothing is lost"):
        signal.raise_signal(signal.SIGTERM)


def test_boundaries_are_passed_when_nobody_asks_to_stop(sentry: Sentry) -> None:
    with sentry.training():
        for _ in range(3):
            sentry.boundary("going on")


def test_watch_goes_on_when_standard_error_has_no_descriptor(sentry: Sentry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with sentry.training():
        time.sleep(1.5)  # two looks
        assert "guard" in {thread.name for thread in threading.enumerate()}


def test_handler_is_the_one_before_when_the_run_has_ended() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Sentry(ALONE, Notes(ALONE), Failures(), hang_timeout_s=60).on_duty():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.multiprocess
def test_rank_that_hangs_is_named_with_its_stack() -> None:
    done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == PeerLost.exit_status
    assert "error: rank 0 on " in done.stderr
    assert "makes no progress since 1 s; it is at 'step 7'. Start again with --resume auto." in done.stderr
    assert "in wait_for_a_lock_that_never_comes" in done.stderr


@pytest.mark.multiprocess
def test_run_stops_in_order_when_its_launcher_is_killed() -> None:
    # the name makes it a launcher
    words = [sys.executable, "-c", LAUNCHED, TRAINING, "scinet-launch"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "training\n"
        launcher.kill()
        assert launcher.stdout.readline() == "stopped in order\n"


class _Board:
    """Notes of other ranks, which change while they are looked at."""

    def __init__(self, before: dict[str, str], after: dict[str, str], *, is_there: bool = True) -> None:
        self.notes, self.after, self.is_there = before, after, is_there

    def get(self, key: str) -> str | None:
        return self.notes.get(key)

    def can_be_read(self) -> bool:
        return self.is_there

    def pass_time(self, _seconds: float) -> None:
        self.notes = self.after


def _beat(beats: int, marks: int, doing: str) -> str:
    return json.dumps([beats, marks, doing, f"host-{doing}"])


def _culprits(monkeypatch: pytest.MonkeyPatch, board: _Board, world_size: int) -> list[str]:
    sentry = Sentry(Ranks(0, world_size, ALONE.device), cast(Any, board), Failures(), hang_timeout_s=60)
    for doing in ("step 1", "step 2"):
        sentry.mark(doing)
    monkeypatch.setattr(guard, "time", SimpleNamespace(sleep=board.pass_time, monotonic=time.monotonic))
    return sentry._culprits()


def test_ranks_that_are_behind_silent_or_gone_are_told_from_those_that_only_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {"beat/1": _beat(5, 1, "a"), "beat/2": _beat(5, 2, "b"), "beat/3": _beat(5, 2, "c")}
    after = {"beat/1": _beat(6, 1, "a"), "beat/2": _beat(5, 2, "b"), "beat/3": _beat(6, 2, "c")}
    assert _culprits(monkeypatch, _Board(before, after), 5) == [
        "rank 1 on host-a, which is still at 'a'",
        "rank 2 on host-b, which gives no sign of life since 'b'",
        "rank 4, which cannot be reached",
    ]
    assert _culprits(monkeypatch, _Board({}, {}), 1) == []
    assert _culprits(monkeypatch, _Board({}, {}, is_there=False), 2) == ["rank 0, which cannot be reached"]


def test_run_stops_when_any_rank_was_asked_to(monkeypatch: pytest.MonkeyPatch, sentry: Sentry) -> None:
    asked: list[float] = []

    def of_two(mine: torch.Tensor, _ranks: Ranks) -> torch.Tensor:
        asked.append(float(mine))
        return mine + 1

    monkeypatch.setattr(guard, "sum_over_ranks", of_two)
    with sentry.training(), pytest.raises(Preempted, match="stopped by SIGTERM"):
        sentry.boundary("going on")
    assert asked == [0.0]


def test_rank_ends_some_seconds_after_another_has_failed_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    class _Told(Failures):
        status = 0

        def elsewhere(self) -> int:
            return self.status

    ended: list[int] = []
    monkeypatch.setattr(guard.os, "_exit", ended.append)
    told = _Told()
    sentry = Sentry(ALONE, Notes(ALONE), told, hang_timeout_s=60)
    for status, now in ((0, 0.0), (PeerLost.exit_status, 50.0), (1, 100.0), (1, 109.0)):
        told.status = status
        sentry._follow_others(now)
    assert ended == []
    sentry._follow_others(111.0)
    assert ended == [1]


def test_parent_is_found_whatever_a_process_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    assert guard._parent_of(os.getpid()) == os.getppid()
    assert guard._parent_of(2**30) is None
    monkeypatch.setattr(guard.Path, "read_text", lambda _: "7 (a) S (1 2) R 42 7 7 0")
    assert guard._parent_of(7) == 42
