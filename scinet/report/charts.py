"""Charts of the report page as SVG documents; matplotlib is imported when the first one is drawn.

Legend: N images, C classes. Every function returns the bytes of one SVG, or None where there is nothing to draw. Text
stays text (the reader's fonts draw it, names in any script stay legible); names come from strangers, so they pass
through `chart_label` and are never read as mathematical markup.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scinet.evaluation.metrics import precision_recall_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_POINTS = 400
"""Points a curve keeps: more than a chart has pixels to show, few enough to keep the page small."""

# Okabe and Ito's palette, told apart by colour-blind readers; the line styles tell the curves apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 1)))


def chart_label(name: str, *, limit: int = 26) -> str:
    """Return `name` in at most `limit` characters, without those that XML forbids or that do not print."""
    printable = "".join(letter if letter.isprintable() else "\ufffd" for letter in name)
    return printable if len(printable) <= limit else printable[: limit - 1] + "…"


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


def line_chart(history: Sequence[dict[str, Any]], keys: dict[str, str], *, mark_best: bool = False) -> bytes | None:
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
    with drawing(5.6, 3.1) as (figure, axes):
        for index, (label, (axis, x, y)) in enumerate(curves.items()):
            x, y = _thin(x, y)
            axes.plot(x, y, label=label, marker="o" if len(x) < 30 else "", markersize=3.5, **_look(index))
            axes.set_xlabel(axis)
            if mark_best and index == 0:
                _mark_highest(axes, x, y)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=6)
        if len(keys) > 1:
            axes.legend(frameon=False)
        axes.margins(y=0.12)
        return to_svg(figure)


def precision_recall_chart(
    scores: np.ndarray, truth: np.ndarray, class_names: Sequence[str], average_precision: Sequence[float | None]
) -> bytes | None:
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
    # The legend stands below the curves: seven class names find no free place inside the square.
    with drawing(5.6, 5.6) as (figure, axes):
        all_scores, all_truth = torch.from_numpy(scores.reshape(-1)), torch.from_numpy(truth.reshape(-1))
        _step_curve(axes, all_scores, all_truth, "all cells (micro)", color="#000000", linewidth=2.2)
        for place, (value, index) in enumerate([*best, *worst]):
            label = f"{chart_label(class_names[index])}, AP {value:.1f}"
            column_scores = torch.from_numpy(np.ascontiguousarray(scores[:, index]))
            column_truth = torch.from_numpy(np.ascontiguousarray(truth[:, index]))
            look = {"color": COLOURS[place], "linestyle": "-", "marker": "os^"[place % 3]}
            if place >= len(best):
                look |= {"linestyle": "--", "markerfacecolor": "white"}
            _step_curve(axes, column_scores, column_truth, label, markevery=0.12, markersize=4.5, **look)
        axes.set(xlim=(0, 1), ylim=(0, 1.03), xlabel="recall", ylabel="precision")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
        return to_svg(figure)


def correlation_chart(correlation: np.ndarray, class_names: Sequence[str]) -> bytes | None:
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
    return matrix_chart(correlation, class_names, cmap="RdBu_r", vmin=-limit, vmax=limit)


def matrix_chart(matrix: np.ndarray, class_names: Sequence[str], **look: Any) -> bytes:
    """Draw a matrix with every class named on both axes; it grows with the number of classes.

    Args:
        matrix: [C,C] float; NaN is grey.
        class_names: C names, at least one.
        look: colour map and limits, as in matplotlib's `imshow`.
    """
    num_classes = len(class_names)
    labels = [chart_label(name, limit=22) for name in class_names]
    # Inches for a class: many for few classes, never less than a 6.5 point letter needs, and 80 fit the page's width.
    pitch = min(0.5, max(0.112, 7.6 / num_classes))
    font = min(10.0, max(6.5, pitch * 72 * 0.72))
    margin = 0.4 + font / 72 * 0.58 * max(len(label) for label in labels)
    side = pitch * num_classes
    with drawing(max(side + margin + 0.75, 4.0), side + margin) as (figure, axes):
        axes.set_facecolor("#bbbbbb")
        image = axes.imshow(matrix, interpolation="nearest", **look)
        places = range(num_classes)
        axes.set_xticks(places, labels, rotation=90, fontsize=font, parse_math=False)
        axes.set_yticks(places, labels, fontsize=font, parse_math=False)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.015)
        bar.outline.set_visible(False)
        return to_svg(figure)


def _step_curve(axes: Axes, scores: torch.Tensor, truth: torch.Tensor, label: str, **look: Any) -> None:
    precision, recall = precision_recall_curve(scores, truth == 1, truth != 0)
    # What follows the last positive adds nothing but a line down the right edge.
    recall = recall[: int(recall.argmax()) + 1]
    keep = np.unique(np.linspace(0, len(recall) - 1, min(len(recall), _MAX_POINTS)).astype(int))
    # Average precision is the area under these steps, so the steps are drawn and not slopes between the points.
    x, y = np.append(0.0, recall.numpy()[keep]), precision.numpy()[keep]
    axes.plot(x, np.append(y[0], y), label=label, drawstyle="steps-pre", **({"linewidth": 1.4} | look))


def _mark_highest(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    best = int(y.argmax())
    axes.plot(x[best], y[best], marker="o", markersize=10, markerfacecolor="none", markeredgecolor="#D55E00")
    axes.annotate(
        f"best {y[best]:.2f}", (x[best], y[best]), xytext=(0, -18), textcoords="offset points", ha="center", va="top"
    )


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average neighbours until at most `_MAX_POINTS` remain: dropping points would show noise or hide it by chance."""
    if len(x) <= _MAX_POINTS:
        return x, y
    # Groups of one size, so that the noise looks alike all along; the last may be smaller.
    starts = np.arange(0, len(x), -(-len(x) // _MAX_POINTS))
    sizes = np.diff(starts, append=len(x))
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def _look(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % 7], "linestyle": _STYLES[index % 7], "linewidth": 1.6}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@contextmanager
def drawing(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """Give a figure of `width` x `height` inches with one pair of axes, under the settings of all charts."""
    with panels(width, height, 1, 1) as (figure, (axes,)):
        yield figure, axes


@contextmanager
def panels(width: float, height: float, num_rows: int, num_columns: int) -> Iterator[tuple[Figure, list[Axes]]]:
    """Give a figure with rows of axes that share their y, under the settings of all charts."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {  # matplotlib types every key by name since 3.11, and by str before
        "svg.fonttype": "none",
        "svg.hashsalt": "scinet",
        "font.size": 9,
        "legend.fontsize": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "text.parse_math": False,
        "axes.formatter.use_mathtext": False,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # matplotlib measures text in its own font; the reader's browser, which draws it, has the missing letters.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height))
        # The reader's font may run wider than the one that matplotlib lays out with: room for that at the edges.
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
        yield figure, list(figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).flat)


def to_svg(figure: Figure) -> bytes:
    """Return the figure as an SVG without background (the page's card is white) and without date or address."""
    buffer = io.BytesIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return buffer.getvalue()
