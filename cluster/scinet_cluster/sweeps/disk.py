"""What a sweep's folder may hold: weights of the best, and nothing that a finished trial no longer needs."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from scinet.errors import ConfigError
from scinet.rundir import RunDirectory
from scinet_cluster.sweeps.ledger import Ledger, Trial


def check(folder: Path, budget_bytes: float) -> None:
    """Refuse a budget that the disk does not have.

    Raises:
        ConfigError: naming both.
    """
    free = shutil.disk_usage(folder).free + used(folder)
    if budget_bytes > free:
        raise ConfigError(
            f"'resources.disk_budget_gb' is {budget_bytes / 2**30:g}, but {folder} has room for {free / 2**30:.1f} "
            "GiB: lower it or give another 'output'"
        )


def prune(folder: Path, ledger: Ledger, keep_weights: int) -> None:
    """Remove the checkpoints of trials that have ended, and the selected weights of all but the best."""
    ended = [trial for trial in ledger.trials.values() if trial.has_ended]
    best = sorted((trial for trial in ended if trial.best is not None), key=lambda trial: -(trial.best or 0.0))
    kept = {trial.number for trial in best[:keep_weights]}
    for trial in ended:
        run = RunDirectory(folder / "trials" / trial.name)
        run.targets.unlink(missing_ok=True)  # what a failed run announced: here it is known that it failed
        checkpoints = run.checkpoints
        for tag in (*checkpoints.glob("step-*"), *checkpoints.glob(".step-*")):
            shutil.rmtree(tag, ignore_errors=True)
        if trial.number not in kept:
            shutil.rmtree(checkpoints / "selected", ignore_errors=True)


def used(folder: Path) -> int:
    """Return the bytes that a folder takes on the disk."""
    return sum(_allocated(Path(base) / name) for base, _, names in os.walk(folder) for name in names)


def largest(folder: Path, trials: Iterable[Trial]) -> str:
    """Return the trials that take most, in words."""
    sizes = sorted(((used(folder / "trials" / trial.name), trial.number) for trial in trials), reverse=True)[:3]
    return ", ".join(f"trial {number}: {size / 2**30:.2f} GiB" for size, number in sizes)


def _allocated(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.lstat().st_blocks * 512
    return 0
