"""Run the ranks of one node: started together, stopped together, none of them left behind."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ALONE_S = 10.0  # how long the others get to end by themselves after a rank has failed
_STOPS = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Start:
    """One rank to start: its number among all nodes, its command and its whole environment."""

    rank: int
    command: Sequence[str]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Outcome:
    """How the ranks of a node ended.

    Attributes:
        status: the most informative of their exit statuses.
        rank: whose it is; None if all are 0.
        is_stopped: whether a signal to the launcher ended them.
    """

    status: int
    rank: int | None
    is_stopped: bool


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    status: int | None = None

    def signal(self, number: signal.Signals) -> None:
        """Signal the rank alone: its loader processes would die of what makes it save."""
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Kill the rank and all it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def has_ended(self) -> bool:
        """Return whether it has, and note how; what it left behind is killed before its number can be given away."""
        if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        self.status = 128 - status if status < 0 else status
        return True


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Keep the signals that :func:`run_ranks` waits for from doing anything else; they wait for it until then."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*_STOPS, signal.SIGCHLD})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_ranks(starts: Sequence[Start], *, grace_s: float, alone_s: float = ALONE_S) -> Outcome:
    """Start ranks and wait until the last has ended; within :func:`signals_held`, from the main thread.

    SIGTERM and SIGINT go on to every rank, once each. When a rank fails, the others get ``alone_s`` to end by
    themselves, then SIGTERM. ``grace_s`` after the first of these signals, whatever still runs is killed. Should this
    process itself be killed, the kernel sends SIGTERM to every rank.

    Args:
        starts: the ranks; each gets a session, and with it a process group, of its own.
        grace_s: how long a rank may take to end after a signal, for instance to write a checkpoint.
        alone_s: how long the others may go on after the first has failed.

    Raises:
        OSError: a rank cannot be started; those that were are killed.
    """
    for stop in _STOPS:
        if stop in signal.sigpending():  # told to stop before there was anything to stop
            return Outcome(128 + stop, None, True)
    in_child = _tie_to(os.getpid())
    ranks: list[_Rank] = []
    try:
        for start in starts:
            process = subprocess.Popen(
                start.command,
                env=start.environment,
                stdin=subprocess.DEVNULL,  # they are no longer in the terminal's session
                start_new_session=True,
                preexec_fn=in_child,
            )
            ranks.append(_Rank(start.rank, process))
        is_stopped, ended = _Watch(ranks, grace_s, alone_s).to_the_end()
    finally:
        for rank in ranks:
            if rank.status is None:
                rank.kill()
                rank.process.wait()
    status, number = _most_informative(ended)
    return Outcome(status, number, is_stopped)


def _tie_to(launcher: int) -> Callable[[], None]:
    """Return what a rank does between fork and exec: ask for SIGTERM at the launcher's death, and hear signals again.

    The launcher has one thread, so that a forked copy of it can run Python.
    """
    prctl = ctypes.CDLL(None).prctl  # found before the fork

    def in_child() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_STOPS, signal.SIGCHLD})
        _end_with(launcher, prctl)

    return in_child


def end_with(parent: int) -> None:
    """Let the kernel send this process SIGTERM when the one that started it is gone, or has gone already."""
    _end_with(parent, ctypes.CDLL(None).prctl)


def _end_with(parent: int, prctl: Any) -> None:
    prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGTERM)


@dataclass
class _Watch:
    ranks: Sequence[_Rank]
    grace_s: float
    alone_s: float
    stop_at: float = math.inf
    kill_at: float = math.inf
    forwarded: set[signal.Signals] = field(default_factory=set)
    ended: list[_Rank] = field(default_factory=list)

    def to_the_end(self) -> tuple[bool, list[_Rank]]:
        """Return whether the launcher was told to stop, and the ranks in the order of their ends."""
        while True:
            self._note_ends()
            running = [rank for rank in self.ranks if rank.status is None]
            if not running:
                return bool(self.forwarded), self.ended
            now = time.monotonic()
            if now >= self.stop_at:
                self.stop_at = math.inf
                self._tell(running, signal.SIGTERM, now)
            if now >= self.kill_at:
                for rank in running:
                    rank.kill()
            self._await_signal(running, now)

    def _note_ends(self) -> None:
        for rank in self.ranks:
            if rank.status is None and rank.has_ended():
                self.ended.append(rank)
                if rank.status and self.stop_at == math.inf and not self.forwarded:
                    self.stop_at = time.monotonic() + self.alone_s

    def _await_signal(self, running: Sequence[_Rank], now: float) -> None:
        """Wait for the next end, deadline or order; a killed rank ends soon, or is beyond any signal (a dead disk)."""
        until = self.stop_at if now >= self.kill_at else min(self.stop_at, self.kill_at)
        # a day: sigtimedwait takes no infinity
        info = signal.sigtimedwait({*_STOPS, signal.SIGCHLD}, max(min(until - now, 86400.0), 0.0))
        if info is None or info.si_signo == signal.SIGCHLD:
            return
        number = signal.Signals(info.si_signo)
        if number not in self.forwarded:
            self.forwarded.add(number)
            self.stop_at = math.inf
            self._tell(running, number, time.monotonic())

    def _tell(self, running: Sequence[_Rank], number: signal.Signals, now: float) -> None:
        for rank in running:
            rank.signal(number)
        self.kill_at = min(self.kill_at, now + self.grace_s)


def _most_informative(ended: Sequence[_Rank]) -> tuple[int, int | None]:
    """Wrong usage before failures that come again before all that a restart cures; of each the first to end.

    The first is the cause: the others have noticed it, or were stopped because of it.
    """

    def weight(rank: _Rank) -> int:
        if not rank.status:
            return 3
        if rank.status >= 128:
            return 2
        return 0 if rank.status == 2 else 1

    worst = min(ended, key=weight)
    return (worst.status, worst.number) if worst.status else (0, None)
