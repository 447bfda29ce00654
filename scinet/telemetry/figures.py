"""The figures of a run for Prometheus: those of each rank, and on rank 0 those of the whole run.

What is observed at every step is a few additions of floats; the rest is read where it lies when the text is made.
Names follow Prometheus' conventions, and the labels `run`, `job` and `instance` are the target's.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any

import psutil
import torch
from prometheus_client import CollectorRegistry, Histogram, Summary
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from scinet.data import retries
from scinet.distributed import Ranks
from scinet.options import Options
from scinet.rundir import git_revision, version_of
from scinet.telemetry.observer import Observer, Standing

_STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_WAIT_BUCKETS = (0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60)
# of a row: the metric, what it says, and what the row's number is divided by
_GAUGES_OF_ROWS = {
    "learning_rate": ("scinet_train_learning_rate", "Largest learning rate of the last logged step", 1),
    "gradient_norm": ("scinet_train_gradient_norm", "Norm of its gradient before clipping", 1),
    "known_ratio": ("scinet_train_known_ratio", "Share of the cells whose label is known, since the row before", 1),
    "pseudo_precision": (
        "scinet_train_pseudo_label_precision_ratio",
        "Share of the pseudo-positives that are right, where the truth is known",
        1,
    ),
    "pseudo_recall": (
        "scinet_train_pseudo_label_recall_ratio",
        "Share of the hidden positives that pseudo-labels find, where the truth is known",
        1,
    ),
}
_HOLDOUT = {"holdout_map": "teacher", "holdout_map_student": "student"}
_PERCENT = 100
# of the rows' fusion/<kind>_<name>: the metric, what it says, its label, and what the row's number is divided by
_FUSION = {
    "weight": ("scinet_fusion_weight", "Fitted weight of a term of the fusion", "term", 1),
    "log_loss": (
        "scinet_holdout_fusion_log_loss",
        "Log-loss on known cells of the hold-out, of the teacher alone, with one term, or with all (fused)",
        "terms",
        1,
    ),
    "map": (
        "scinet_holdout_fusion_mean_average_precision_ratio",
        "mAP on known cells of the hold-out, of the teacher alone, with one term, or with all (fused)",
        "terms",
        _PERCENT,
    ),
}


class Figures(Observer):
    """Those of one rank, each with the label ``rank``."""

    def __init__(self, ranks: Ranks) -> None:
        """Begin with nothing observed."""
        self.registry = CollectorRegistry()
        self._ranks, self._rank, self._steps = ranks, str(ranks.rank), 0
        self._process = psutil.Process()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["rank"], buckets=buckets, registry=self.registry).labels(self._rank)

        self._duration = histogram(
            "scinet_step_duration_seconds",
            "Time of a training step, its wait for data included",
            _STEP_BUCKETS,
        )
        self._wait = histogram("scinet_data_wait_seconds", "Time for which a step waited for data", _WAIT_BUCKETS)
        fusion = "Time of the fusion in a micro-batch, and of taking a step into its state; without waiting for others"
        self._fusion = Summary("scinet_fusion_duration_seconds", fusion, ["rank"], registry=self.registry).labels(
            self._rank
        )
        self.registry.register(self)

    def step(self, *, seconds: float, waited_s: float, fusion_s: Iterable[float]) -> None:
        """Take the times of a step."""
        self._steps += 1
        self._duration.observe(seconds)
        self._wait.observe(waited_s)
        for taken_s in fusion_s:
            self._fusion.observe(taken_s)

    def collect(self) -> Iterator[Metric]:
        """Yield what is read where it lies."""
        own = {"rank": self._rank}
        yield _counter("scinet_rank_steps_total", "Steps that a rank has done since it was started", self._steps, own)
        tried = "Attempts of a rank to read a source again, since it was started"
        yield _counter("scinet_data_retries_total", tried, retries.total(), own)
        resident = "Resident memory of a rank's process, without its loader processes"
        yield _gauge("scinet_process_resident_memory_bytes", resident, self._process.memory_info().rss, own)
        if self._ranks.device.type == "cuda":
            allocated = "Memory of its GPU that a rank's tensors take"
            held = torch.cuda.memory_allocated(self._ranks.device)
            yield _gauge("scinet_gpu_memory_allocated_bytes", allocated, held, own)


class RunFigures(Figures):
    """Those of rank 0, and of the whole run; a sink of its rows."""

    name = "Prometheus"

    def __init__(self, options: Options, ranks: Ranks) -> None:
        """Begin with what is known before the first step."""
        self._standing: Standing | None = None
        self._row: dict[str, float] = {}
        self._holdout: dict[str, float] = {}
        self._fitted: dict[str, float] = {}
        self._best = self._pseudo_labels = 0.0
        self._written = self._failures = 0
        self._writing_s = self._stalled_s = self._last_written = 0.0
        self._about = [
            _gauge(
                "scinet_build_info",
                "What computes the run",
                1,
                {
                    "version": version_of("scinet") or "",
                    "revision": git_revision() or "",
                    "torch": torch.__version__,
                    "deepspeed": metadata.version("deepspeed"),
                    "python": platform.python_version(),
                },
            ),
            _gauge(
                "scinet_run_info",
                "Which run it is",
                1,
                {"run": options.name, "method": options.method.value, "profile": options.profile.value},
            ),
            _gauge("scinet_world_size", "Ranks of the run", ranks.world_size),
        ]
        super().__init__(ranks)

    def stand(self, standing: Standing) -> None:
        """Take where the run stands."""
        self._standing = standing

    def stalled(self, seconds: float) -> None:
        """Take how long training stood still for a checkpoint."""
        self._stalled_s += seconds

    def checkpoint(self, seconds: float, *, is_written: bool) -> None:
        """Take how long a checkpoint took, and whether it was written."""
        if is_written:
            self._written += 1
            self._writing_s += seconds
            self._last_written = time.time()
        else:
            self._failures += 1

    def write(self, row: dict[str, Any]) -> None:
        """Take a row of the run."""
        evaluated = {network: row[key] / _PERCENT for key, network in _HOLDOUT.items() if row.get(key) is not None}
        if evaluated:
            self._holdout = evaluated
            self._best = max(self._best, evaluated.get("teacher", 0.0))
            self._fitted = {key: value for key, value in row.items() if key.startswith("fusion/")}
        else:
            self._row = {name: value for name, value in row.items() if value is not None}
            self._pseudo_labels += self._row.get("pseudo_positives", 0)

    def close(self, patience_s: float) -> None:
        """Keep what was taken."""

    def collect(self) -> Iterator[Metric]:
        """Yield what is read where it lies."""
        yield from self._about
        yield from self._training()
        yield from self._evaluation()
        yield from self._checkpoints()
        yield from super().collect()

    def _training(self) -> Iterator[Metric]:
        standing, row = self._standing, self._row
        if standing is not None:
            yield _counter("scinet_train_samples_total", "Samples that were trained on", standing.samples)
            yield _counter("scinet_train_steps_total", "Optimiser steps", standing.steps)
            yield _gauge("scinet_train_planned_steps", "Optimiser steps of the whole run", standing.planned_steps)
            yield _gauge("scinet_train_epoch", "Epochs that have ended", standing.epoch)
            skipped = "Samples that could not be read and were left out"
            yield _counter("scinet_train_skipped_samples_total", skipped, standing.skipped_samples)
            bad = "Steps with numbers that are not finite, which were left out"
            yield _counter("scinet_train_bad_steps_total", bad, standing.bad_steps)
        losses = {name.removeprefix("loss/"): value for name, value in row.items() if name.startswith("loss/")}
        if losses:
            family = GaugeMetricFamily(
                "scinet_train_loss", "Loss and its parts, mean since the logged step before", labels=["part"]
            )
            for part, value in losses.items():
                family.add_metric([part], value)
            yield family
        for key, (name, text, divisor) in _GAUGES_OF_ROWS.items():
            if key in row:
                yield _gauge(name, text, row[key] / divisor)
        if "pseudo_positives" in row:
            labels = "Unknown cells that were made positive for a step"
            yield _counter("scinet_train_pseudo_labels_total", labels, self._pseudo_labels)

    def _evaluation(self) -> Iterator[Metric]:
        if self._holdout:
            family = GaugeMetricFamily(
                "scinet_holdout_mean_average_precision_ratio", "Hold-out mAP at the last evaluation", labels=["network"]
            )
            for network, value in self._holdout.items():
                family.add_metric([network], value)
            yield family
            best = "Hold-out mAP of the teacher at the selected epoch"
            yield _gauge("scinet_holdout_best_mean_average_precision_ratio", best, self._best)

        for kind, (name, text, label, divisor) in _FUSION.items():
            start = f"fusion/{kind}_"
            found = {key.removeprefix(start): value for key, value in self._fitted.items() if key.startswith(start)}
            if found:
                family = GaugeMetricFamily(name, text, labels=[label])
                for which, value in found.items():
                    family.add_metric([which], value / divisor)
                yield family

    def _checkpoints(self) -> Iterator[Metric]:
        duration = Metric(
            "scinet_checkpoint_duration_seconds", "Time from a checkpoint's copy in memory to its name", "summary"
        )
        duration.add_sample("scinet_checkpoint_duration_seconds_count", {}, self._written)
        duration.add_sample("scinet_checkpoint_duration_seconds_sum", {}, self._writing_s)
        yield duration
        if self._last_written:
            last = "When the last checkpoint was written"
            yield _gauge("scinet_checkpoint_last_timestamp_seconds", last, self._last_written)
        stalled = "Time for which training stood still for checkpoints"
        yield _counter("scinet_checkpoint_stall_seconds_total", stalled, self._stalled_s)
        yield _counter("scinet_checkpoint_failures_total", "Checkpoints that were not written", self._failures)


def _gauge(name: str, text: str, value: float, labels: dict[str, str] | None = None) -> Metric:
    return _single(GaugeMetricFamily(name, text, labels=list(labels or {})), value, labels)


def _counter(name: str, text: str, value: float, labels: dict[str, str] | None = None) -> Metric:
    return _single(CounterMetricFamily(name, text, labels=list(labels or {})), value, labels)


def _single(family: Any, value: float, labels: dict[str, str] | None) -> Metric:
    # a name from a command line may hold bytes that are no text
    family.add_metric([label.encode("utf-8", "replace").decode() for label in (labels or {}).values()], value)
    found: Metric = family
    return found
