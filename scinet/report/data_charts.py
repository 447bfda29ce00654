"""Charts of a data set's page: class frequencies, labels an image, classes that occur together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scinet.report.charts import COLOURS, drawing, matrix_chart, to_svg

_MAX_BINS = 60
_MAX_STEPS = 2000


def frequency_chart(counts: dict[str, np.ndarray]) -> bytes | None:
    """Draw how often classes occur, most frequent first, on a logarithmic scale.

    Args:
        counts: name of the curve to [C] counts; all curves follow the order of the first.
    """
    first = next(iter(counts.values()))
    if not len(first):
        return None
    order = np.argsort(-first, kind="stable")
    with drawing(8.6, 3.2) as (figure, axes):
        places = np.unique(np.linspace(0, len(order) - 1, min(len(order), _MAX_STEPS)).astype(int))
        for number, (name, values) in enumerate(counts.items()):
            look = {"color": COLOURS[number], "linewidth": 1.6 if number == 0 else 0.8}
            axes.step(places + 1, values[order][places], where="mid", label=name, **look)  # type: ignore[arg-type]
        # logarithmic above 1, and a class that never occurs still has a place below it
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=0)
        axes.set_xlim(0.5, len(order) + 0.5)
        axes.set(xlabel="classes, most frequent first", ylabel="images (logarithmic)")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        if len(counts) > 1:
            axes.legend(frameon=False)
        return to_svg(figure)


def label_count_chart(counts: dict[str, np.ndarray]) -> bytes | None:
    """Draw how many labels an image has, as shares of each split.

    Args:
        counts: split to the number of its images with 0, 1, 2, ... positives.
    """
    counts = {name: values for name, values in counts.items() if values.sum()}
    if not counts:
        return None
    longest = max(len(values) for values in counts.values())
    width = -(-longest // _MAX_BINS)
    edges = np.arange(0, longest + width, width)
    with drawing(8.6, 3.0) as (figure, axes):
        bar = 0.8 * width / len(counts)
        for number, (name, values) in enumerate(counts.items()):
            shares = np.add.reduceat(values, edges[edges < len(values)]) / values.sum()
            places = edges[: len(shares)] + (width - 1) / 2 + (number - (len(counts) - 1) / 2) * bar
            axes.bar(places, 100 * shares, bar, label=name, color=COLOURS[number % len(COLOURS)])
        axes.set(xlabel="positive labels of an image", ylabel="images of the split, %")
        axes.locator_params(axis="x", integer=True)
        axes.legend(frameon=False)
        return to_svg(figure)


def cooccurrence_chart(conditional: np.ndarray, class_names: Sequence[str]) -> bytes | None:
    """Draw [S, S] shares of the row's images that have the column's class too; the diagonal is left out."""
    if len(class_names) < 2:
        return None
    shown = conditional.copy()
    np.fill_diagonal(shown, np.nan)
    finite = shown[np.isfinite(shown)]
    return matrix_chart(shown, class_names, cmap="Blues", vmin=0.0, vmax=max(float(finite.max(initial=0.0)), 1e-3))
