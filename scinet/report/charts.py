"""Charts of a run's page.

Legend: N images, C classes. Every function returns a drawing of `scinet.report.svg`, or None where there is nothing to
draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from scinet.evaluation.metrics import precision_recall_curve
from scinet.report.rendering import COLOURS, chart_label
from scinet.report.svg import INK, MARKERS, Look, Plot, heat_map, look, scale

_MAX_POINTS = 400
"""Points a curve keeps: more than a chart has pixels to show, few enough to keep the page small."""
_MAX_MARKED = 30  # points of a curve, beyond which markers would hide it
_SPACING = 0.2  # of markers along a precision-recall curve

# ColorBrewer's "RdBu", from blue to red
_DIVERGING = (
    *("#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7"),
    *("#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f"),
)


def series(history: Sequence[dict[str, Any]], key: str) -> tuple[str, np.ndarray, np.ndarray]:
    """Return what the horizontal axis counts, and the finite points of one key of the history, in its order.

    Args:
        history: rows of metrics.jsonl; a row without the key, or with something else than a finite number, is passed.
        key: the metric.

    Returns:
        "samples seen" where any row counts them, else "steps"; positions and values, float64 of one length.
    """
    axis = "samples_seen" if any("samples_seen" in row for row in history) else "step"
    points = [(row[axis], row[key]) for row in history if _is_number(row.get(axis)) and _is_number(row.get(key))]
    points.sort(key=lambda point: point[0])
    both = np.array(points, dtype=np.float64).reshape(-1, 2)
    return ("samples seen" if axis == "samples_seen" else "steps"), both[:, 0], both[:, 1]


def line_chart(history: Sequence[dict[str, Any]], keys: dict[str, str], *, mark_best: bool = False) -> str | None:
    """Draw metrics of the history over the samples seen.

    Args:
        history: rows of metrics.jsonl.
        keys: metric to its name in the legend; those without a point are left out.
        mark_best: ring the highest point of the first curve and write its value.
    """
    curves = {label: series(history, key) for key, label in keys.items()}
    curves = {label: curve for label, curve in curves.items() if len(curve[1])}
    if not curves:
        return None
    thinned = {label: _thin(x, y) for label, (_, x, y) in curves.items()}
    axis, x, y = next(iter(curves.values()))
    best = int(y.argmax())
    positions, values = np.concatenate([np.stack(curve) for curve in thinned.values()], axis=1)
    if mark_best:
        values = np.append(values, y[best])  # which averaging may have lowered
    plot = Plot(540, 300, scale(positions, axis, num_steps=5, is_whole=True), scale(values, margin=0.12))
    for index, (label, points) in enumerate(thinned.items()):
        plot.curve(*points, look(index, is_marked=len(points[0]) < _MAX_MARKED), label if len(keys) > 1 else "")
    if mark_best:
        plot.ring(x[best], y[best], f"best {y[best]:.2f}")
    return plot.drawing()


def precision_recall_chart(
    scores: np.ndarray, truth: np.ndarray, class_names: Sequence[str], average_precision: Sequence[float | None]
) -> str | None:
    """Draw precision over recall: all known cells together, the three best classes and the three worst.

    Args:
        scores: [N,C] float, without NaN.
        truth: [N,C] integer, +1 positive, -1 negative, 0 unknown.
        class_names: C names.
        average_precision: C percentages, None for a class to leave out.
    """
    ranked = [(value, index) for index, value in enumerate(average_precision) if value is not None]
    ranked.sort(key=lambda pair: (-pair[0], pair[1]))
    if not ranked or not (truth == 1).any():
        return None
    best, worst = ranked[:3], ranked[3:][-3:]
    shares = np.linspace(0, 1, 6)
    plot = Plot(540, 440, scale(shares, "recall", margin=0), scale(shares, "precision", margin=0))
    _step_curve(plot, scores, truth, "all cells (micro)", Look(INK, width=3))
    for place, (value, index) in enumerate([*best, *worst]):
        is_worst = place >= len(best)
        own = Look(COLOURS[place], "7 3" if is_worst else "", MARKERS[place % 3], is_open=is_worst, width=1.8)
        name = f"{chart_label(class_names[index])}, AP {value:.1f}"
        _step_curve(plot, scores[:, index], truth[:, index], name, own)
    return plot.drawing()


def correlation_chart(correlation: np.ndarray, class_names: Sequence[str]) -> str | None:
    """Draw a label correlation matrix with every class named on both axes; it grows with the number of classes.

    Args:
        correlation: [C,C] float; the scale follows the largest value off the diagonal, NaN is grey.
        class_names: C names.
    """
    if not class_names:
        return None
    off_diagonal = np.abs(correlation[~np.eye(len(class_names), dtype=bool)])
    finite = off_diagonal[np.isfinite(off_diagonal)]
    limit = max(float(finite.max(initial=0.0)), 1e-3)
    return heat_map(correlation, class_names, _DIVERGING, -limit, limit)


def _step_curve(plot: Plot, scores: np.ndarray, truth: np.ndarray, label: str, look: Look) -> None:
    flat, known = torch.from_numpy(scores.reshape(-1)), torch.from_numpy(truth.reshape(-1))
    precision, recall = (found.numpy() for found in precision_recall_curve(flat, known == 1, known != 0))
    # What follows the last positive adds nothing but a line down the right edge.
    num_shown = int(recall.argmax()) + 1
    keep = np.unique(np.linspace(0, num_shown - 1, min(num_shown, _MAX_POINTS)).astype(int))
    # Average precision is the area under these steps, so the steps are drawn and not slopes between the points.
    edges, heights = np.append(0.0, recall[keep]), precision[keep]
    length = np.cumsum(np.diff(edges) + np.abs(np.diff(heights, prepend=heights[0])))
    marks = np.unique(np.searchsorted(length, np.arange(_SPACING / 2, length[-1], _SPACING)))
    plot.steps(edges, heights, look, label, marks.tolist())


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average neighbours until at most `_MAX_POINTS` remain: dropping points would show noise or hide it by chance."""
    if len(x) <= _MAX_POINTS:
        return x, y
    # Groups of one size, so that the noise looks alike all along; the last may be smaller.
    starts = np.arange(0, len(x), -(-len(x) // _MAX_POINTS))
    sizes = np.diff(starts, append=len(x))
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
