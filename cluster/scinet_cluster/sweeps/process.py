"""One node's share of a trial: ``scinet-launch`` as a process of its own, with what it says in a log."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scinet_cluster.sweeps.options import ResourceOptions

_TAIL_BYTES = 20_000
_SLACK_S = 15.0  # beyond the launcher's own grace


@dataclass(frozen=True)
class Job:
    """What all trials of a sweep share.

    Attributes:
        folder: of the sweep, absolute.
        script: the training's.
        cwd: where the training starts, so that relative paths mean the same everywhere.
        resources: of a trial.
    """

    folder: Path
    script: str
    cwd: str
    resources: ResourceOptions


@dataclass(frozen=True)
class Place:
    """Which node of a trial this is, and where its ranks meet."""

    node: int
    num_nodes: int
    master_addr: str
    master_port: int


class LaunchedShare:
    """The launcher of one node, started, polled and ended."""

    def __init__(self, log: Path, *, ranks: int, cpus_per_rank: int, grace_s: float) -> None:
        """Prepare.

        Args:
            log: file that gets what launcher and ranks say.
            ranks: on this node.
            cpus_per_rank: threads of each.
            grace_s: from SIGTERM to SIGKILL.
        """
        self._log, self._ranks, self._cpus, self._grace_s = log, ranks, cpus_per_rank, grace_s
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, words: Sequence[str], place: Place) -> None:
        """Start the ranks of this node.

        Args:
            words: script and arguments.
            place: of this node in the trial.
        """
        options = ["--parent", str(os.getpid()), "--ranks-per-node", str(self._ranks), "--grace", str(self._grace_s)]
        if place.num_nodes > 1:
            options += ["--nodes", str(place.num_nodes), "--node-rank", str(place.node)]
            options += ["--master-addr", place.master_addr, "--master-port", str(place.master_port)]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "scinet_cluster.launch", *options, "--", *words],
                env={**os.environ, "OMP_NUM_THREADS": str(self._cpus), "OMP_WAIT_POLICY": "passive"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # what Ray does to this process's group is not meant for the ranks
            )

    def status(self) -> int | None:
        """Return the launcher's exit status, a signal's as 128 and its number; None while it runs."""
        if self._process is None:
            return 0
        status = self._process.poll()
        return 128 - status if status is not None and status < 0 else status

    def stop(self) -> None:
        """End it, by SIGTERM, which lets the ranks save, or by SIGKILL when that takes too long."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(self._grace_s + _SLACK_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)  # the kernel then tells its ranks to end
            self._process.wait()

    def last_error(self) -> str:
        """Return the last error that was told, or the last line of the log."""
        with contextlib.suppress(OSError), self._log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            return (errors or lines or [""])[-1]
        return ""
