"""Charts of a data set's page: class frequencies, labels an image, classes that occur together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scinet.report.rendering import COLOURS
from scinet.report.svg import Plot, Scale, heat_map, look, scale

_MAX_BINS = 60
_MAX_STEPS = 2000

# ColorBrewer's "Blues"
_RISING = ("#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")


def frequency_chart(counts: np.ndarray) -> str | None:
    """Draw [C] counts of how often classes occur, most frequent first, on a logarithmic scale."""
    if not len(counts):
        return None
    ranked = np.sort(counts)[::-1]
    places = np.unique(np.linspace(0, len(ranked) - 1, min(len(ranked), _MAX_STEPS)).astype(int))
    edges = np.concatenate([[0.5], (places[1:] + places[:-1]) / 2 + 1, [len(ranked) + 0.5]])
    # logarithmic above 1, and a class that never occurs still has a place below it
    heights = np.where(ranked > 0, 1 + np.log10(ranked.clip(1)), 0.0)[places]
    top = max(float(heights[0]), 1.0)
    powers = [(0.0, "0"), *((power + 1.0, f"{10**power:,}") for power in range(int(top)))]
    across = scale(edges[[0, -1]], "classes, most frequent first", margin=0, is_whole=True)
    plot = Plot(826, 310, across, Scale(0, 1.05 * top, powers, "images (logarithmic)"))
    plot.steps(edges, heights, look(0, is_marked=False))
    return plot.drawing()


def label_count_chart(counts: dict[str, np.ndarray]) -> str | None:
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
    shares = {name: 100 * np.add.reduceat(v, edges[edges < len(v)]) / v.sum() for name, v in counts.items()}
    top = max(float(values.max()) for values in shares.values())
    across = scale(np.array([-0.5, edges[-1] - 0.5]), "positive labels of an image", is_whole=True)
    plot = Plot(826, 290, across, scale(np.array([0, 1.05 * top]), "images of the split, %", margin=0))
    bar = 0.8 * width / len(counts)
    for number, (name, values) in enumerate(shares.items()):
        places = edges[: len(values)] + (width - 1) / 2 + (number - (len(counts) - 1) / 2) * bar
        plot.bars(places, values, bar, COLOURS[number % len(COLOURS)], name)
    return plot.drawing()


def cooccurrence_chart(conditional: np.ndarray, class_names: Sequence[str]) -> str | None:
    """Draw [S, S] shares of the row's images that have the column's class too; the diagonal is left out."""
    if len(class_names) < 2:
        return None
    shown = conditional.copy()
    np.fill_diagonal(shown, np.nan)
    finite = shown[np.isfinite(shown)]
    return heat_map(shown, class_names, _RISING, 0.0, max(float(finite.max(initial=0.0)), 1e-3))
