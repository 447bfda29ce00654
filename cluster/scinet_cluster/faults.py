"""What may befall a training run, inflicted on purpose: killed, stopped or hung processes, and a full disk."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

MARK = "SCINET_SOAK"


class Fault(Enum):
    """What is done to a run; the values are what is said about it."""

    kill_rank = "SIGKILL of a rank"
    kill_loader = "SIGKILL of a loader process"
    kill_launcher = "SIGKILL of the launcher"
    terminate = "SIGTERM"
    hang = "SIGSTOP of a rank"
    fill_disk = "a full disk"


@dataclass(frozen=True)
class Processes:
    """A run's processes at one moment."""

    everyone: list[int]
    ranks: list[int]
    loaders: list[int]


def processes(mark: str) -> Processes:
    """Return the living processes whose environment carries the mark."""
    found: dict[int, tuple[int, bool]] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            environment = (folder / "environ").read_bytes().split(b"\0")
            if f"{MARK}={mark}".encode() in environment:
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    is_rank = any(entry.startswith(b"RANK=") for entry in environment)
                    found[int(folder.name)] = (int(parent), is_rank)
    of_ranks = {process for process, (_, is_rank) in found.items() if is_rank}
    ranks = sorted(process for process in of_ranks if found[process][0] not in of_ranks)
    loaders = sorted(process for process in of_ranks if found[process][0] in ranks)
    return Processes(sorted(found), ranks, loaders)


def inflict(fault: Fault, launcher: int, mark: str, chance: random.Random) -> Fault:
    """Do it to a run, and return what was done: the launcher is killed where there is no such process now."""
    living = processes(mark)
    victims = living.loaders if fault is Fault.kill_loader else living.ranks
    if fault is Fault.terminate:
        _signal(launcher, signal.SIGTERM)
    elif fault is Fault.kill_launcher or not victims:
        _signal(launcher, signal.SIGKILL)
        return Fault.kill_launcher
    elif fault is Fault.fill_disk:
        limit_files(mark, 0)
    else:
        _signal(chance.choice(victims), signal.SIGSTOP if fault is Fault.hang else signal.SIGKILL)
    return fault


def limit_files(mark: str, size: int) -> None:
    """Let a run's ranks write no file beyond a size in bytes, which they meet as a failed write; -1 ends that."""
    for rank in processes(mark).ranks:
        with contextlib.suppress(ProcessLookupError):
            _, hard = resource.prlimit(rank, resource.RLIMIT_FSIZE)
            resource.prlimit(rank, resource.RLIMIT_FSIZE, (size, hard))


def kill_all(mark: str) -> None:
    """Kill what is left of a run."""
    for process in processes(mark).everyone:
        _signal(process, signal.SIGKILL)


def _signal(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)
