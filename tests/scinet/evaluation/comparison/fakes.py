"""Finished cells that nobody trained, and plans for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from scinet.evaluation.comparison import plan, training
from scinet.evaluation.comparison.plan import Cell, Plan
from scinet.evaluation.comparison.scoring import Entry
from scinet.evaluation.comparison.store import Course, Finished, Record, TestSet

PLAN = """
output: out
base: base.yaml
methods:
  scinet: []
  bce: [method=bce]
known_ratios: [0.1, 0.5]
seeds: [0, 1]
"""


def make_plan(folder: Path, text: str = PLAN) -> Plan:
    """A plan's file beside its base, read; its output lies in the same folder."""
    (folder / "base.yaml").write_text("train: {epochs: 3}\n")
    (folder / "plan.yaml").write_text(text.replace("output: out", f"output: {folder / 'out'}"))
    return plan.read(folder / "plan.yaml")


def make_test_set(num_images: int = 60, num_classes: int = 4, seed: int = 0) -> TestSet:
    """Truth of which a third is positive."""
    drawn = torch.rand(num_images, num_classes, generator=torch.Generator().manual_seed(seed))
    truth = torch.where(drawn < 1 / 3, 1, -1).to(torch.int8)
    return TestSet(truth, tuple(f"class {index}" for index in range(num_classes)), "fakes")


def make_finished(test_set: TestSet, quality: float, seed: int = 0, peak: float | None = None) -> Finished:
    """Predictions that are noise at quality 0 and perfect from 1 on; the last epoch's are a little worse."""
    noise = torch.rand(test_set.truth.shape, generator=torch.Generator().manual_seed(1000 + seed))
    found = {
        moment: torch.sigmoid(4 * (noise - 0.5 + share * quality * test_set.truth))
        for moment, share in (("selected", 1.0), ("last", 0.9))
    }
    judged = {moment: training.judge(scores, test_set.truth) for moment, scores in found.items()}
    course = Course(
        holdout=50.0 + quality,
        best_epoch=1,
        num_epochs=3,
        student=40.0,
        test_peak=peak,
        seconds=2.0,
        world={"device": "CPU", "torch": "2", "host": "here", "ranks": 1, "threads": 1, "git_revision": None},
    )
    return Finished(Record(course, judged, test_set.name), found, test_set)


def make_entries(
    wanted: Plan, quality: Callable[[Cell], float | None], test_set: TestSet, *, peak: float | None = None
) -> list[Entry]:
    """The grid's cells, each as good as told; None for one that failed."""
    entries = []
    for number, cell in enumerate(plan.expand(wanted)):
        value = quality(cell)
        record = None if value is None else make_finished(test_set, value, cell.seed, peak).record
        entries.append(Entry(cell, f"{number:016x}", record, "it broke" if record is None else ""))
    return entries
