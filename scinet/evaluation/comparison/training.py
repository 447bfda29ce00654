"""One cell under the common protocol: every method with the same data, budget, and selection on the hold-out."""

from __future__ import annotations

import contextlib
import math
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from scinet import materials, rundir
from scinet.distributed import Ranks
from scinet.errors import DataError
from scinet.evaluation import fused
from scinet.evaluation.comparison import keys
from scinet.evaluation.comparison.store import FUSED, Course, Finished, Judgement, Record, Store, TestSet
from scinet.evaluation.evaluator import Scores
from scinet.evaluation.metrics import bootstrap, evaluate
from scinet.materials import Materials
from scinet.options import Method, Options
from scinet.telemetry import MetricsLog, Silence
from scinet.trainer import Trainer

RESAMPLES = 1000
"""Of the test images, equal for all cells of a test set: their differences are paired."""


class Trainings:
    """Trains cells one after the other, on materials that they share."""

    def __init__(self, store: Store, ranks: Ranks, progress: Callable[[str, int, int], None], num_threads: int) -> None:
        """Take the folder of the cells, this process, who is told how far features are, and threads to make them."""
        self._store, self._ranks, self._progress, self._num_threads = store, ranks, progress, num_threads
        self._made: tuple[Any, Materials] | None = None

    def train(self, options: Options, *, test_peak: bool) -> Finished:
        """Train a cell and test its teacher at the epoch that the hold-out selects, and at the last one.

        Args:
            options: of the cell.
            test_peak: whether to test at every evaluated epoch, for the highest.

        Raises:
            DataError: a split has no positive to judge by.
            ScinetError: as gathering materials and training do.
        """
        made, ranks = self._materials(options), self._ranks
        started = time.monotonic()
        if options.method is Method.zero_shot:
            network = made.zero_shot(options).to(ranks.device).eval()
            scores, told = _untrained(made.plain("test").score(network, ranks))
        else:
            trainer = Trainer(options, made, ranks, MetricsLog(None), Silence())
            scores, best, told = _trained(trainer, test_peak=test_peak)
            scores |= _fused(options, made, ranks, best)
        course = Course(**told, seconds=time.monotonic() - started, world=_world(ranks))
        judgements = {moment: judge(found.probabilities, found.truth) for moment, found in scores.items()}
        card = made.card
        test_set = TestSet(scores["last"].truth, tuple(card.class_names), card.name)
        predictions = {moment: found.probabilities for moment, found in scores.items()}
        return Finished(Record(course, judgements, test_set.name), predictions, test_set)

    def _materials(self, options: Options) -> Materials:
        # a mask is drawn while training: no part of the materials
        key = (keys.unmasked(options.data), options.model)
        if self._made is None or self._made[0] != key:
            self._made = None  # features of a large set take gigabytes: never two of them
            # one process makes features, with more threads; the others wait for it and read them
            with self._store.alone(), threads(self._num_threads):
                self._made = key, materials.gather(options, self._ranks, self._progress)
        return self._made[1]


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _untrained(scores: Scores) -> tuple[dict[str, Scores], dict[str, Any]]:
    value = _map(scores)
    told = {"holdout": None, "best_epoch": None, "num_epochs": 0, "student": value, "test_peak": value}
    return {"selected": scores, "last": scores}, told


def _trained(trainer: Trainer, *, test_peak: bool) -> tuple[dict[str, Scores], dict[str, Tensor], dict[str, Any]]:
    """Return test scores by moment, the selected teacher's weights, and what else the training tells."""
    found: dict[str, Scores] = {}
    best: dict[str, Tensor] = {}
    peak: float | None = None
    while not trainer.is_finished:
        trainer.train_epoch()
        if not trainer.evaluation_is_due:
            continue
        is_best = trainer.evaluate_holdout()
        if is_best or test_peak:
            scores = trainer.score("test", use_teacher=True)
        if is_best:
            found["selected"] = scores
            best = trainer.teacher_weights()
        if test_peak:
            peak = max(_map(scores), peak or 0.0)
    if "selected" not in found:
        raise DataError("the hold-out selects no epoch, since its mAP is no number: none of its labels is positive")
    found["last"] = trainer.score("test", use_teacher=True)
    progress = trainer.progress
    return (
        found,
        best,
        {
            "holdout": progress.best_map,
            "best_epoch": progress.best_epoch,
            "num_epochs": progress.epoch,
            "student": _map(trainer.score("test", use_teacher=False)),
            "test_peak": peak,
        },
    )


def _fused(options: Options, made: Materials, ranks: Ranks, best: dict[str, Tensor]) -> dict[str, Scores]:
    """Return the test scores of the selected teacher and its bank, where it has one."""
    if not fused.is_wanted(options):
        return {}
    network = made.network(options).to(ranks.device).eval()
    network.load_state_dict(best)
    classifier = fused.build(network, made, options, ranks)
    return {} if classifier is None else {FUSED: fused.both(made.plain("test"), network, classifier, ranks)[1]}


def judge(probabilities: Tensor, truth: Tensor) -> Judgement:
    """Return predictions [N, C] in figures, by the truth [N, C].

    Raises:
        DataError: there is no positive to judge by.
    """
    metrics = evaluate(probabilities, truth)
    if math.isnan(metrics.mean_average_precision):
        raise DataError("the test split has no positive, so there is no mAP: build the data with other images")
    return Judgement(
        metrics.mean_average_precision,
        metrics.class_f1,
        metrics.overall_f1,
        metrics.per_class_average_precision,
        bootstrap(probabilities, truth, samples=RESAMPLES),
    )


def _map(scores: Scores) -> float:
    return evaluate(scores.probabilities, scores.truth).mean_average_precision


def _world(ranks: Ranks) -> dict[str, Any]:
    is_gpu = ranks.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(ranks.device) if is_gpu else "CPU",
        "host": platform.node(),
        "ranks": ranks.world_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "git_revision": rundir.git_revision(),
    }
