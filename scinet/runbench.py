"""A short real run, timed: how long its steps wait for data, and for a checkpoint."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from scinet import config
from scinet.checkpoint.keeper import Keeper
from scinet.distributed import Ranks
from scinet.materials import Materials
from scinet.notes import Notes
from scinet.options import Options
from scinet.pairing import Verdict
from scinet.rundir import RunDirectory
from scinet.telemetry import MetricsLog, Silence
from scinet.trainer import Trainer

_MOST_WAITING, _MOST_STALLED = 0.05, 0.02


def real_run(
    options: Options, made: Materials, ranks: Ranks, num_steps: int, say: Callable[[str], None]
) -> list[Verdict]:
    """Train some steps on the data themselves, save after each, and return the shares of both waits.

    A checkpoint has been written when the next one begins, as where an epoch lies between the two. The first step
    fills the windows of the stream and is left out.

    Args:
        options: of the run; nothing is written into its directory.
        made: what it is made from.
        ranks: this process.
        num_steps: steps.
        say: told what is being done.
    """
    what = "cached features" if options.data.cache_features else "images"
    say(f"a short run on {what}")
    log = MetricsLog(None)
    short = config.replace(options, train__max_steps=num_steps, train__log_every_steps=1)
    trainer = Trainer(short, made, ranks, log, Silence())
    seconds, stalls = [], []
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder))
        directory.checkpoints.mkdir()
        patience_s = short.train.collective_timeout_s
        keeper = Keeper(directory, short.checkpoint, ranks, patience_s=patience_s, notes=Notes(ranks))
        started = time.monotonic()

        def after_step() -> None:
            nonlocal started
            seconds.append(time.monotonic() - started)
            before = keeper.stalled_s
            keeper.save(trainer)
            stalls.append(keeper.stalled_s - before)
            keeper.wait()
            started = time.monotonic()

        while not trainer.is_finished:
            trainer.train_epoch(after_step)
    size = options.train.global_batch_size
    # the log's share is of a time in which checkpoints were made too
    waited = [row["data_wait_share"] * size / row["samples_per_second"] for row in log.rows]
    shares = tuple(wait / whole for wait, whole in zip(waited, seconds, strict=True))
    step_s = statistics.median(seconds[1:])
    every = options.checkpoint.every_steps or trainer.steps_per_epoch * options.train.evaluate_every_epochs
    return [
        Verdict(f"{what}: wait for data / time, data.workers={options.data.workers}", shares[1:], _MOST_WAITING, True),
        Verdict(
            f"{what}: stall of a checkpoint / time between two ({every} steps of {step_s:.3g} s)",
            tuple(stall / (every * step_s) for stall in stalls[1:]),
            _MOST_STALLED,
            True,
        ),
    ]
