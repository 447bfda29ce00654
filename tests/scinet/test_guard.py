"""A run stops where it can go on later, and a rank that hangs is named and does not wait for ever."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

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
