"""What may end a run from outside: a scheduler's SIGTERM, a launcher that died, a rank that hangs.

SIGTERM lets the step be finished; all ranks then agree to stop, so that a checkpoint can be written. A launcher that is
gone counts as a SIGTERM. A rank that makes no progress is named with its stack, and no rank waits for it any longer.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

from scinet.distributed import Ranks, sum_over_ranks
from scinet.errors import PeerLost, Preempted, TrainingError
from scinet.notes import Failures, Notes

_LAUNCHERS = (
    "deepspeed",
    "torchrun",
    "torch.distributed.run",
    "torch/distributed/run",
    "scinet-launch",
    "scinet_cluster",
)
_STDERR = 2  # the descriptor: what stands in for sys.stderr, in a notebook for instance, may have none
_LOOKS_EVERY_S = 0.5
_BEATS_EVERY_S = 2.0
_SILENCE_S = 3 * _BEATS_EVERY_S
_UNWINDS_S = 10.0  # what a rank that has failed like the others may take to end by itself


class Guard:
    """Watches over nothing: for runs that nobody stops from outside, such as measurements."""

    def mark(self, doing: str) -> None:
        """Note that this rank makes progress, and what it does next."""

    def boundary(self, doing: str) -> None:
        """Note progress where the run could stop and go on later, and stop there if any rank was asked to. Collective.

        Raises:
            Preempted: on all ranks alike.
        """


class Sentry(Guard):
    """Watches over a training run from a thread of its own."""

    def __init__(self, ranks: Ranks, notes: Notes, failures: Failures, *, hang_timeout_s: float) -> None:
        """Take the ranks.

        Args:
            ranks: this process among all.
            notes: a board of its own.
            failures: what other ranks tell of theirs.
            hang_timeout_s: longest time between two marks.
        """
        self._ranks, self._notes, self._failures, self._hang_timeout_s = ranks, notes, failures, hang_timeout_s
        self._is_asked = False
        self._is_training = False
        self._failed_s = math.inf
        self._marks, self._marked_s, self._doing = 0, time.monotonic(), ""
        self._ended = threading.Event()
        self._launchers = _launchers()

    @contextlib.contextmanager
    def on_duty(self) -> Iterator[None]:
        """Take SIGTERM and watch, until the run has ended."""
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, self._take_signal) if is_main else None
        thread = threading.Thread(target=self._watch, name="guard", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()
            if is_main:
                signal.signal(signal.SIGTERM, before)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Wait for the next boundary when asked to stop, and expect marks."""
        self.mark("beginning")
        self._is_training = True
        try:
            yield
        finally:
            self._is_training = False

    def mark(self, doing: str) -> None:
        """Note that this rank makes progress, and what it does next."""
        self._marks, self._marked_s, self._doing = self._marks + 1, time.monotonic(), doing

    def boundary(self, doing: str) -> None:
        """Note progress where the run could stop and go on later, and stop there if any rank was asked to. Collective.

        Raises:
            Preempted: on all ranks alike.
        """
        self.mark("waiting for the other ranks")
        asked = torch.tensor(float(self._is_asked), device=self._ranks.device)
        if float(sum_over_ranks(asked, self._ranks)) > 0:
            raise Preempted("stopped by SIGTERM")
        self.mark(doing)

    def _take_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._is_asked = True
        if not self._is_training:
            raise Preempted("stopped by SIGTERM before the first step, nothing is lost")

    def _watch(self) -> None:
        """Look after launcher and progress, and tell the other ranks that this one lives."""
        beats, last_beat_s = 0, 0.0
        while not self._ended.wait(_LOOKS_EVERY_S):
            if self._launchers and not all(_parent_of(child) == parent for child, parent in self._launchers):
                self._launchers = []
                os.kill(os.getpid(), signal.SIGTERM)
            now = time.monotonic()
            has_beat = now - last_beat_s >= _BEATS_EVERY_S
            if has_beat:
                beats, last_beat_s = beats + 1, now
                self._follow_others(now)
            if not self._is_training:
                faulthandler.cancel_dump_traceback_later()
                continue
            # where something holds the interpreter's lock, this thread hangs too
            faulthandler.dump_traceback_later(self._hang_timeout_s + 4 * _SILENCE_S, exit=True, file=_STDERR)
            if has_beat:
                self._notes.put(f"beat/{self._ranks.rank}", json.dumps([beats, self._marks, self._doing, _where()]))
            if now - self._marked_s > self._hang_timeout_s:
                self._give_up()

    def _follow_others(self, now: float) -> None:
        """End this process if another rank has failed for good and this one still waits for it, as NCCL's do."""
        if self._failures.elsewhere() != TrainingError.exit_status:
            return
        self._failed_s = min(self._failed_s, now)
        if now - self._failed_s > _UNWINDS_S:
            os._exit(TrainingError.exit_status)

    def _give_up(self) -> None:
        """Say which rank hangs and where, and end this process."""
        frames = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(frames))
        standing = f"rank {self._ranks.rank} on {_where()} makes no progress since {self._hang_timeout_s:g} s"
        culprits = self._culprits()
        if culprits:
            standing += f", it waits for {'; '.join(culprits)}"
        text = f"error: {standing}; it is at '{self._doing}'. Start again with --resume auto.\n"
        # of ranks that only wait, one is enough
        if not culprits or self._notes.is_first("hang"):
            print(text + ("" if culprits else f"Its stack:\n{stack}"), file=sys.stderr, end="", flush=True)
        os._exit(PeerLost.exit_status)

    def _culprits(self) -> list[str]:
        """Return the other ranks that are behind this one or give no sign of life, in words."""
        others = [rank for rank in range(self._ranks.world_size) if rank != self._ranks.rank]
        before = {rank: self._notes.get(f"beat/{rank}") for rank in others}
        time.sleep(_SILENCE_S if others else 0)
        if not self._notes.can_be_read():
            return ["rank 0, which cannot be reached"]
        found = []
        for rank in others:
            note = self._notes.get(f"beat/{rank}")
            if note is None:
                found.append(f"rank {rank}, which cannot be reached")
                continue
            beats, marks, doing, where = json.loads(note)
            if before[rank] is not None and json.loads(before[rank] or "")[0] == beats:
                found.append(f"rank {rank} on {where}, which gives no sign of life since '{doing}'")
            elif marks < self._marks:
                found.append(f"rank {rank} on {where}, which is still at '{doing}'")
        return found


def _where() -> str:
    return f"{platform.node()} (process {os.getpid()})"


def _launchers() -> list[tuple[int, int]]:
    """Return the chain of launchers above this process, as pairs of a process and its parent."""
    chain, child = [], os.getpid()
    while (parent := _parent_of(child)) is not None and parent > 1:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace")
            if any(name in command for name in _LAUNCHERS):
                chain.append((child, parent))
                child = parent
                continue
        break
    return chain


def _parent_of(process: int) -> int | None:
    """Return a process's parent, or None if it is gone or there is no /proc."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    # the name, which may hold anything, stands in parentheses before it
    return int(status.rpartition(")")[2].split()[1])
