"""Carry out a sweep's agenda on a Ray cluster, until it is done, interrupted or cannot go on."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ray import tune

from scinet.errors import TrainingError
from scinet_cluster.sweeps import disk, placement
from scinet_cluster.sweeps.agenda import Agenda
from scinet_cluster.sweeps.ledger import Ledger
from scinet_cluster.sweeps.options import ResourceOptions, Sweep
from scinet_cluster.sweeps.process import Job
from scinet_cluster.sweeps.trainable import TrialActor
from scinet_cluster.sweeps.tuning import AgendaSearcher, SparingScheduler, stopping_rule

_LOOKS_EVERY_S = 5.0


def drive(sweep: Sweep, agenda: Agenda, ledger: Ledger, job: Job, *, address: str, say: Callable[[str], None]) -> int:
    """Carry out what is left of the agenda, and return an exit status: 0, 130 or 143.

    Args:
        sweep: its configuration.
        agenda: what comes next.
        ledger: what has been.
        job: what all trials share.
        address: of a Ray cluster; empty: one within this process.
        say: told of what is about to happen.

    Raises:
        ConfigError: no cluster at the address, or not one trial fits.
        TrainingError: the sweep cannot go on.
    """
    resources = sweep.options.resources
    with _ray_words(job.folder), placement.connected(address), _interruptions() as interruption:
        fits = placement.capacity(resources)
        concurrent = min(fits, resources.concurrent or fits)
        say(_plan(sweep, agenda, concurrent))
        watch = _Watch(agenda, ledger, job.folder, resources, say)
        epochs = sweep.base.train.epochs
        scheduler = SparingScheduler(stopping_rule(sweep.options.stopping, epochs), epochs)
        scheduler.replay(ledger.trials.values())
        scratch = job.folder / ".ray"
        shutil.rmtree(scratch, ignore_errors=True)
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(TrialActor, job=job), placement.bundles(resources)),
            tune_config=tune.TuneConfig(
                search_alg=AgendaSearcher(agenda, scheduler.is_stopped),
                scheduler=scheduler,
                num_samples=agenda.num_left,
                max_concurrent_trials=concurrent,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(scratch),
                stop=watch,
                callbacks=[watch],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # trainings keep their own
                failure_config=tune.FailureConfig(max_failures=resources.restarts),
                verbose=0,
            ),
        )
        tuner.fit()
        shutil.rmtree(scratch, ignore_errors=True)
    problem = agenda.refusal or watch.problem
    if problem:
        raise TrainingError(problem)
    return 0 if agenda.is_done else interruption.status


class _Watch(tune.Callback, tune.Stopper):
    """Keeps the folder within its budget, and ends a sweep that nothing can help."""

    def __init__(
        self,
        agenda: Agenda,
        ledger: Ledger,
        folder: Path,
        resources: ResourceOptions,
        say: Callable[[str], None],
    ) -> None:
        """Begin."""
        self._agenda, self._ledger, self._folder, self._resources = agenda, ledger, folder, resources
        self._say = say
        self._looked_s = self._worked_s = time.monotonic()
        self.problem = ""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop no single trial."""
        return False

    def stop_all(self) -> bool:
        """Return whether the sweep cannot go on."""
        return bool(self.problem or self._agenda.refusal)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that a trial's actor is gone; its training ends by itself, and goes on where there is room."""
        print(trial.get_error())  # into Ray's log
        self._say(f"trial {trial.config['number']} lost its process or its node: it goes on from its checkpoint")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Keep why a trial's actor was lost for the last time."""
        print(trial.get_error())

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look after disk and progress every few seconds."""
        now = time.monotonic()
        if now - self._looked_s < _LOOKS_EVERY_S:
            return
        self._looked_s = now
        disk.prune(self._folder, self._ledger, self._resources.keep_weights)
        budget, size = self._resources.disk_budget_gb * 2**30, disk.used(self._folder)
        if size > budget:
            self.problem = (
                f"{self._folder} takes {size / 2**30:.2f} GiB, resources.disk_budget_gb is {budget / 2**30:g} "
                f"({disk.largest(self._folder, self._ledger.trials.values())}): raise it or run fewer trials at once"
            )
        if any(trial.status == "RUNNING" for trial in trials):
            self._worked_s = now
        elif now - self._worked_s > self._resources.wait_s:
            self.problem = (
                f"no trial could be placed for {self._resources.wait_s:g} s (resources.wait_s): others hold what the "
                "cluster has, or a node is gone"
            )


@dataclass
class _Interruption:
    status: int = 130


@contextmanager
def _ray_words(folder: Path) -> Iterator[None]:
    """Keep what Ray has to say, pages for a lost node, in a file beside the trials' own."""
    with (folder / "logs/ray.log").open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        yield


@contextmanager
def _interruptions() -> Iterator[_Interruption]:
    """Let SIGTERM stop the sweep as Ctrl-C does: trials save and end, and it can go on later."""
    interruption = _Interruption()

    def stop(_number: int, _frame: FrameType | None) -> None:
        interruption.status = 143
        os.kill(os.getpid(), signal.SIGINT)

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if is_main else None
    try:
        yield interruption
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _plan(sweep: Sweep, agenda: Agenda, concurrent: int) -> str:
    resources = sweep.options.resources
    ranks = resources.nodes * resources.ranks_per_node
    devices = f", {resources.gpus_per_rank:g} GPU(s)" if resources.gpus_per_rank else ""
    return (
        f"{sweep.folder}: {sweep.options.trials} trials over {len(sweep.space)} options, at most {agenda.num_left} "
        f"trainings to go, {concurrent} at once with {ranks} rank(s) of {resources.cpus_per_rank} core(s){devices} "
        f"each; disk: at most {resources.disk_budget_gb:g} GiB"
    )
