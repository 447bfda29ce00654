"""From finished cells to what is said of them: means over seeds, paired intervals over test images, who is best.

Legend: S resamples of the test images, equal for all cells of a test set.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from scinet.evaluation.comparison.plan import Cell, Plan
from scinet.evaluation.comparison.plan import unchanged as find_unchanged
from scinet.evaluation.comparison.store import FUSED, MOMENTS, Record, TestSet
from scinet.evaluation.metrics import percentile_interval
from scinet.options import Method

MEAN = "mean over known ratios"
TITLES = {
    "selected": "Test mAP at the epoch that the hold-out selects",
    "last": "Test mAP at the last epoch",
    FUSED: "Test mAP of the fused answer, of that epoch and its bank",
    "test_peak": "Test-set peak: the highest test mAP of all epochs, chosen on the test images themselves",
}


@dataclass(frozen=True)
class Entry:
    """A cell of the grid and what became of it."""

    cell: Cell
    key: str
    record: Record | None
    failure: str = ""


@dataclass(frozen=True)
class _Score:
    """One seed's mAP; [S] mAPs of the resamples, None where the predictions are not kept; on which test sets."""

    value: float
    resampled: Tensor | None
    truths: tuple[str, ...]


_Scores = dict[int, _Score]  # by seed


def summarise(plan: Plan, entries: Sequence[Entry], test_sets: dict[str, TestSet]) -> dict[str, Any]:
    """Return all that a comparison's files say, as a JSON tree.

    Args:
        plan: what was to run.
        entries: its cells, in the order of the grid.
        test_sets: by name, those that records refer to.
    """
    done = [entry for entry in entries if entry.record]
    has_fused = any(FUSED in entry.record.judgements for entry in done if entry.record)
    moments = (*MOMENTS, *([FUSED] if has_fused else []), *(["test_peak"] if plan.test_peak else []))
    ceilings = _ceilings(entries)
    rows = {moment: _table(plan, entries, moment, ceilings) for moment in moments}
    unchanged = find_unchanged(plan)
    return {
        "name": plan.output.name,
        "base": str(plan.base),
        "seeds": list(plan.seeds),
        "methods": {method: list(overrides) for method, overrides in plan.methods.items()},
        "columns": [
            {
                "name": column.name,
                "known_ratio": column.known_ratio,
                "axis": column.axis,
                "place": column.place,
                "is_unchanged": column.name in unchanged,
            }
            for column in plan.columns
        ],
        "first": next(iter(plan.methods)),
        "ceilings": list(ceilings),
        "ranked_by": _ranked_by(plan),
        "tables": {moment: {"title": TITLES[moment], "rows": own} for moment, own in rows.items()},
        "beside": _beside(plan, done),
        "classes": _classes(plan, done, rows["selected"], test_sets, ceilings),
        "test_sets": _told(test_sets.values()),
        "worlds": sorted({_world(entry.record) for entry in done if entry.record}),
        "num_cells": len(entries),
        "num_done": len(done),
        "cells": [_row(entry) for entry in entries],
    }


def _told(test_sets: Iterable[TestSet]) -> list[str]:
    """Return the test sets in words; those of one name and size, which differ in their labels, are counted."""
    counted = Counter(f"{found.data_set}: {len(found.truth)} images" for found in test_sets)
    return [text if number == 1 else f"{text} ({number} such sets)" for text, number in sorted(counted.items())]


def _ceilings(entries: Sequence[Entry]) -> tuple[str, ...]:
    """Return the methods that see all labels: they are shown beside the others and compete with none."""
    seen = {entry.cell.method: entry.cell.options.method is Method.full_labels for entry in entries}
    return tuple(method for method, is_ceiling in seen.items() if is_ceiling)


def _table(plan: Plan, entries: Sequence[Entry], moment: str, ceilings: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each method and column, and for the mean over known ratios where there are several."""
    grid: dict[tuple[str, str], _Scores] = {}
    for entry in entries:
        scores = grid.setdefault((entry.cell.method, entry.cell.column.name), {})
        if entry.record and (moment != FUSED or FUSED in entry.record.judgements):
            scores[entry.cell.seed] = _score(entry.record, moment)
    ratios, names = _ratios(plan), [column.name for column in plan.columns]
    if len(ratios) > 1:
        names.append(MEAN)
        for method in plan.methods:
            grid[method, MEAN] = _mean([grid[method, name] for name in ratios])
    rows = []
    for name in names:
        column = {method: grid[method, name] for method in plan.methods}
        best = _best({method: scores for method, scores in column.items() if method not in ceilings})
        first = next(iter(column.values()))
        for method, scores in column.items():
            values = [score.value for score in scores.values()]
            behind = None if best is None or method in (best, *ceilings) else _difference(column[best], scores)
            rows.append(
                {
                    "method": method,
                    "column": name,
                    "mean": statistics.fmean(values) if values else None,
                    "std": statistics.stdev(values) if len(values) > 1 else None,
                    "num_seeds": len(values),
                    "difference": None if scores is first else _difference(scores, first),
                    "is_best": method == best,
                    "is_within_best": behind is not None and behind["low"] <= 0 <= behind["high"],
                }
            )
    return rows


def _ratios(plan: Plan) -> list[str]:
    return [column.name for column in plan.columns if column.known_ratio is not None]


def _ranked_by(plan: Plan) -> str:
    """Return the column by which methods are ranked as a whole."""
    return MEAN if len(_ratios(plan)) > 1 else plan.columns[0].name


def _score(record: Record, moment: str) -> _Score:
    if moment == "test_peak":
        assert record.course.test_peak is not None
        return _Score(record.course.test_peak, None, (record.truth,))
    judgement = record.judgements[moment]
    return _Score(judgement.mean_average_precision, judgement.resampled, (record.truth,))


def _mean(columns: Sequence[_Scores]) -> _Scores:
    """Return the mean over columns of each seed that has them all: a missing cell must not move a mean."""
    found = {}
    for seed in columns[0]:
        if all(seed in column for column in columns):
            scores = [column[seed] for column in columns]
            vectors = [score.resampled for score in scores if score.resampled is not None]
            found[seed] = _Score(
                statistics.fmean(score.value for score in scores),
                torch.stack(vectors).mean(0) if len(vectors) == len(scores) else None,
                tuple(truth for score in scores for truth in score.truths),
            )
    return found


def _best(column: dict[str, _Scores]) -> str | None:
    """Return the method with the highest mean among those with the most seeds, the first of equals.

    None where nothing is measured, or a method has nobody to compete with.
    """
    most = max(map(len, column.values()), default=0)
    if not most or len(column) == 1:
        return None
    complete = [method for method, scores in column.items() if len(scores) == most]
    return max(complete, key=lambda method: statistics.fmean(score.value for score in column[method].values()))


def _difference(scores: _Scores, others: _Scores) -> dict[str, Any] | None:
    """Return the mean difference over the seeds that both have, with its 95 % interval over test images.

    The images are drawn once for all seeds. None where nothing can be paired: no common seed, or another test set.
    """
    pairs = [
        (mine, theirs)
        for seed, mine in scores.items()
        if (theirs := others.get(seed)) is not None and mine.truths == theirs.truths
    ]
    vectors = [
        mine.resampled - theirs.resampled
        for mine, theirs in pairs
        if mine.resampled is not None and theirs.resampled is not None
    ]
    if not vectors:
        return None
    pooled = torch.stack(vectors).mean(0)
    low, high = percentile_interval(pooled[pooled.isfinite()])
    mean = statistics.fmean(mine.value - theirs.value for mine, theirs in pairs)
    return {"mean": mean, "low": low, "high": high, "num_seeds": len(vectors)}


def _beside(plan: Plan, done: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return for each method the means over its finished cells of what stands beside the mAP."""
    rows = []
    for method in plan.methods:
        records = [entry.record for entry in done if entry.record and entry.cell.method == method]
        rows.append(
            {
                "method": method,
                "num_cells": len(records),
                "class_f1": _fmean(record.judgements["selected"].class_f1 for record in records),
                "overall_f1": _fmean(record.judgements["selected"].overall_f1 for record in records),
                "student": _fmean(record.course.student for record in records),
                "holdout": _fmean(record.course.holdout for record in records),
                "best_epoch": _fmean(record.course.best_epoch for record in records),
                "seconds": _fmean(record.course.seconds for record in records),
            }
        )
    return rows


def _fmean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _classes(
    plan: Plan,
    done: Sequence[Entry],
    table: Sequence[dict[str, Any]],
    test_sets: dict[str, TestSet],
    ceilings: Sequence[str],
) -> dict[str, Any] | None:
    """Return each class's average precision under the first method and the best of the others, largest gain first.

    Means over the cells that both have; None without another method, or where cells were tested on different sets.
    """
    first, *others = plan.methods
    names = {truth for entry in done if entry.record for truth in [entry.record.truth]}
    rank = _ranked_by(plan)
    ranked = {row["method"]: row["mean"] for row in table if row["column"] == rank and row["mean"] is not None}
    rivals = [method for method in others if method in ranked and method not in ceilings]
    other = max(rivals, key=lambda method: ranked[method], default=None)
    if other is None or len(names) != 1:
        return None
    own, theirs = ({_place(e.cell): e.record for e in done if e.cell.method == method} for method in (first, other))
    common = [place for place in own if place in theirs]
    rows: list[dict[str, Any]] = []
    for index, name in enumerate(test_sets[names.pop()].class_names):
        pairs = [[_of_class(cells[place], index) for cells in (own, theirs)] for place in common]
        known = [(mine, his) for mine, his in pairs if mine is not None and his is not None]
        if known:
            means = [statistics.fmean(column) for column in zip(*known, strict=True)]
            rows.append({"name": name, "first": means[0], "other": means[1], "difference": means[0] - means[1]})
    rows.sort(key=lambda row: -row["difference"])
    return {"other": other, "rows": rows} if rows else None


def _place(cell: Cell) -> tuple[str, int]:
    return cell.column.name, cell.seed


def _of_class(record: Record | None, index: int) -> float | None:
    assert record is not None
    return record.judgements["selected"].per_class[index]


def _world(record: Record) -> str:
    world = record.course.world
    return f"{world['device']}, torch {world['torch']}"


def _row(entry: Entry) -> dict[str, Any]:
    cell, record = entry.cell, entry.record
    row: dict[str, Any] = {
        "method": cell.method,
        "column": cell.column.name,
        "known_ratio": cell.column.known_ratio,
        "seed": cell.seed,
        "state": "done" if record else "failed" if entry.failure else "missing",
        "failure": entry.failure,
        "key": entry.key,
    }
    if record is None:
        return row
    figures = {moment: judged.mean_average_precision for moment, judged in record.judgements.items()}
    course = asdict(record.course)
    f1 = {name: getattr(record.judgements["selected"], name) for name in ("class_f1", "overall_f1")}
    return row | figures | f1 | course | {"truth": record.truth}
