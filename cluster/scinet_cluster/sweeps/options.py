"""The configuration tree of a sweep; its YAML files lie in ``configs/sweeps``."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scinet import config
from scinet.errors import ConfigError
from scinet.option import option
from scinet.options import Options
from scinet_cluster.sweeps import space

# what a sweep decides of its trials; they run side by side, so each picks a port
_OWN = ("name", "output", "resume", "baseline", "train.test_at_end", "telemetry.port")


class Sampler(enum.Enum):
    """Which parameters come next: Optuna's tree of Parzen estimators, at random, or every combination of choices."""

    tpe = "tpe"
    random = "random"
    grid = "grid"


class Stopping(enum.Enum):
    """Which trials end early: Ray Tune's asynchronous successive halving, its median rule, or none."""

    asha = "asha"
    median = "median"
    none = "none"


@dataclass(frozen=True)
class StoppingOptions:
    """When a trial ends early because others of its epoch did better."""

    rule: Stopping = option(Stopping.asha, "asha, median, or none")
    grace_epochs: int = option(2, "epochs that every trial gets", low=1)
    reduction_factor: float = option(3.0, "asha: of so many trials one goes on at each rung", low=1.01)


@dataclass(frozen=True)
class ConfirmOptions:
    """The end of a sweep: the best few and the default trained anew with other seeds, since one seed is luck."""

    top: int = option(2, "how many of the best; 0: none, the best of one seed is taken", low=0)
    seeds: int = option(2, "trainings of each, with seeds that the search has not used", low=1)


@dataclass(frozen=True)
class ResourceOptions:
    """What a trial gets, and what all of them together may take."""

    nodes: int = option(1, "hosts of a trial", low=1)
    ranks_per_node: int = option(1, "ranks on each", low=1)
    cpus_per_rank: int = option(1, "cores, and threads, of a rank", low=1)
    gpus_per_rank: float = option(0.0, "GPUs of a rank; a part, such as 0.5, lets trials share one", low=0.0)
    memory_gb_per_rank: float = option(0.0, "host memory that Ray reserves for a rank, GiB; 0: none", low=0.0)
    concurrent: int = option(0, "trials at once; 0: as many as fit", low=0)
    restarts: int = option(2, "times that a trial may go on after it was killed, lost a rank or its node", low=0)
    trial_timeout_s: float = option(86400.0, "longest time of a trial, restarts included", low=1.0)
    wait_s: float = option(600.0, "longest time without a running trial, should others hold the resources", low=1.0)
    disk_budget_gb: float = option(20.0, "what the sweep's folder may take, GiB", low=0.001)
    keep_weights: int = option(1, "best trials whose selected weights are kept", low=0)


@dataclass(frozen=True)
class SweepOptions:
    """The whole configuration of a sweep."""

    name: str = option("sweep", "name of the sweep; its folder is <output>/<name>")
    output: str = option("runs/sweeps", "folder of the sweeps, on a file system that all nodes share")
    config: str = option("", "configuration of the training, relative to this file")
    fixed: dict[str, Any] = option({}, "options that every trial changes, such as `train.epochs: 8`")
    space: dict[str, Any] = option({}, "option: {low, high, log} or a list of choices")
    trials: int = option(16, "trials of the search, the first of which is the default", low=1)
    seed: int = option(0, "of the search", low=0)
    sampler: Sampler = option(Sampler.tpe, "tpe, random, or grid")
    stopping: StoppingOptions = field(default_factory=StoppingOptions)
    confirm: ConfirmOptions = field(default_factory=ConfirmOptions)
    resources: ResourceOptions = field(default_factory=ResourceOptions)


@dataclass(frozen=True)
class Sweep:
    """A checked sweep: its options, the training that its trials change, and what they change."""

    options: SweepOptions
    base: Options
    space: dict[str, space.Dimension]

    @property
    def folder(self) -> Path:
        """Where all of it lies."""
        return Path(self.options.output) / self.options.name


def load(path: Path, overrides: list[str]) -> Sweep:
    """Return the sweep of a file with ``key=value`` overrides.

    Raises:
        ConfigError: naming all that is wrong with the sweep, its training or one of its dimensions.
    """
    options = config.load_as(SweepOptions, path, overrides)
    problems = list(_problems(options, path))
    if problems:
        raise ConfigError("; ".join(f"{path}: {problem}" for problem in problems))
    fixed = [f"{key}={_spelled(value)}" for key, value in space.flattened(options.fixed)]
    own = ["train.test_at_end=false", "baseline=", "checkpoint.keep_last=1", "telemetry.port=0"]
    base = config.load(path.parent / options.config, [*fixed, *own])
    config.refuse_debug(base, "a sweep")
    return Sweep(options, base, space.parse(options.space, base))


def _problems(options: SweepOptions, path: Path) -> list[str]:
    found = []
    if not options.config:
        found.append("'config' is empty, expected the training's configuration, such as ../quickstart.yaml")
    if not options.space:
        found.append("'space' is empty, expected at least one option to search")
    if not options.name or Path(options.name).name != options.name:
        found.append(f"'name' is {options.name!r}, expected a plain folder name")
    found += [
        f"'{key}' is the sweep's own to set: take it out of '{section}'"
        for section in ("fixed", "space")
        for key, _ in space.flattened(getattr(options, section))
        if key in _OWN
    ]
    resources = options.resources
    ranks = resources.nodes * resources.ranks_per_node
    if resources.gpus_per_rank % 1 and (resources.gpus_per_rank > 1 or ranks > 1):
        found.append(
            f"'resources.gpus_per_rank' is {resources.gpus_per_rank:g}, expected a whole number for {ranks} rank(s): "
            "a part of a GPU is for trials of one rank"
        )
    if options.sampler is Sampler.grid:
        found += [
            f"'space.{key}' is a range, expected a list of choices for 'sampler=grid'"
            for key, value in space.flattened(options.space)
            if not isinstance(value, list)
        ]
    return found


def _spelled(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value!r}" if isinstance(value, str) else str(value)
