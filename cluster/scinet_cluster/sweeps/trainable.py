"""A trial as Ray Tune sees it: an actor that starts a training, tells each evaluation, and ends it.

The training is another process tree: it neither shares the actor's interpreter nor dies with an exception of it, and
the kernel ends it when the actor is gone. It never reports to Ray; the actor reads its ``metrics.jsonl``.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from scinet.errors import FIRST_CURABLE
from scinet.telemetry import read_metrics
from scinet_cluster.addresses import free_port
from scinet_cluster.sweeps.options import ResourceOptions
from scinet_cluster.sweeps.process import Job, LaunchedShare, Place

_LOOKS_EVERY_S = 0.2
GRACE_S = 30.0


class Share:
    """The actor on each further node of a trial."""

    def __init__(self, cwd: str, log: str, resources: ResourceOptions) -> None:
        """Prepare the launcher."""
        os.chdir(cwd)
        self._share = LaunchedShare(
            Path(log), ranks=resources.ranks_per_node, cpus_per_rank=resources.cpus_per_rank, grace_s=GRACE_S
        )

    def start(self, words: list[str], place: Place) -> None:
        """Start this node's ranks."""
        self._share.start(words, place)

    def status(self) -> int | None:
        """Return the launcher's exit status, None while it runs."""
        return self._share.status()

    def stop(self) -> None:
        """End it."""
        self._share.stop()

    def last_error(self) -> str:
        """Return the last error that was told."""
        return self._share.last_error()

    def standing(self) -> tuple[str, list[str]]:
        """Return this node's address, as the cluster knows it, and the devices that Ray has given to this actor."""
        own = ray.get_runtime_context().get_node_id()
        address = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == own)
        return str(address), [str(device) for device in ray.get_gpu_ids()]


class TrialActor(tune.Trainable):
    """One trial, on one node or several."""

    def setup(self, config: dict[str, Any], job: Job) -> None:  # type: ignore[override]  # tune.with_parameters adds it
        """Find the trial's nodes and start its training.

        Args:
            config: ``number``, ``seed`` and ``parameters`` of the trial.
            job: what all trials share.
        """
        self._job, self._config = job, config
        name = f"{config['number']:04d}"
        self._run = job.folder / "trials" / name
        log = job.folder / "logs" / f"{name}.log"
        self._here = Share(job.cwd, str(log), job.resources)
        self._others = [
            _remote_share(bundle).remote(job.cwd, str(log.with_suffix(f".{bundle}.log")), job.resources)
            for bundle in range(1, job.resources.nodes)
        ]
        self._words = _words(job, config, name)
        self._told_epoch, self._best = 0, float("nan")
        self._seen: tuple[int, int] | None = None
        self._restarts_left = job.resources.restarts
        self._deadline = time.monotonic() + job.resources.trial_timeout_s
        self._placed = self._standing()
        self._start()

    def step(self) -> dict[str, Any]:
        """Return the next evaluation of the training, or its end."""
        while True:
            statuses = [self._here.status(), *ray.get([other.status.remote() for other in self._others])]
            told = self._next_evaluation()
            if told is not None:
                return told
            if all(status is not None for status in statuses):
                failure = self._failure([status for status in statuses if status])
                if failure is None and any(statuses):
                    self._start()
                    continue
                return self._result(done=True, failed=failure or "")
            if time.monotonic() > self._deadline:
                self._stop()
                limit = self._job.resources.trial_timeout_s
                return self._result(done=True, failed=f"took longer than resources.trial_timeout_s={limit:g}")
            time.sleep(_LOOKS_EVERY_S)

    def cleanup(self) -> None:
        """End the training, should it still run."""
        self._stop()

    def _start(self) -> None:
        shares = self._job.resources.nodes
        place = Place(0, shares, self._placed[0][1], free_port() if shares > 1 else 0)
        started = [
            other.start.remote(self._words, Place(node, shares, place.master_addr, place.master_port))
            for node, other in enumerate(self._others, start=1)
        ]
        self._here.start(self._words, place)
        ray.get(started)

    def _stop(self) -> None:
        stopped = [other.stop.remote() for other in self._others]
        self._here.stop()
        with contextlib.suppress(ray.exceptions.RayError):  # a node that is gone has nothing left to stop
            ray.get(stopped)

    def _standing(self) -> list[tuple[int, str, str]]:
        """Return rank, host and device of each rank; within a host ranks take its devices in order."""
        hosts = [self._here.standing(), *ray.get([other.standing.remote() for other in self._others])]
        ranks = self._job.resources.ranks_per_node
        return [
            (node * ranks + local, host, f"cuda {devices[local % len(devices)]}" if devices else "cpu")
            for node, (host, devices) in enumerate(hosts)
            for local in range(ranks)
        ]

    def _failure(self, statuses: list[int]) -> str | None:
        """Return why a trial has failed for good; None where it has not, or may start again."""
        if not statuses:
            return None
        repeated = [status for status in statuses if status < FIRST_CURABLE]
        told = [self._here.last_error(), *ray.get([other.last_error.remote() for other in self._others])]
        reason = next(filter(None, told), "")
        if repeated:
            return f"status {min(repeated)}: {reason}"
        self._restarts_left -= 1
        if self._restarts_left >= 0:
            return None
        return f"status {statuses[0]}, after {self._job.resources.restarts} restarts: {reason}"

    def _next_evaluation(self) -> dict[str, Any] | None:
        path = self._run / "metrics.jsonl"
        try:
            found = path.stat()
        except OSError:
            return None
        now = (found.st_size, found.st_mtime_ns)
        if now == self._seen:
            return None
        with contextlib.suppress(OSError, json.JSONDecodeError):  # it is just being replaced
            for row in read_metrics(path):
                value = row.get("holdout_map")
                epoch = row["epoch"] + 1
                if value is not None and epoch > self._told_epoch:
                    self._told_epoch = epoch
                    self._best = value if self._best != self._best else max(self._best, value)
                    return self._result(holdout_map=value)
            self._seen = now
        return None

    def _result(self, **further: Any) -> dict[str, Any]:
        return {"epochs": self._told_epoch, "best_map": self._best, "placed": self._placed, **further}


def _words(job: Job, config: dict[str, Any], name: str) -> list[str]:
    own = {"name": name, "output": str(job.folder / "trials"), "seed": config["seed"], **config["parameters"]}
    overrides = [f"{key}={_spelled(value)}" for key, value in own.items()]
    return [job.script, "--config", str(job.folder / "base.yaml"), "--resume", "auto", *overrides]


def _spelled(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _remote_share(bundle: int) -> Any:
    """Return the class of an actor in a further bundle of this trial's placement group, with all that is in it."""
    group = ray.util.get_current_placement_group()
    assert group is not None
    resources = dict(group.bundle_specs[bundle])
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    cpus, gpus, memory = (resources.pop(name, 0) for name in ("CPU", "GPU", "memory"))
    return ray.remote(Share).options(num_cpus=cpus, num_gpus=gpus, memory=memory or None, scheduling_strategy=strategy)
