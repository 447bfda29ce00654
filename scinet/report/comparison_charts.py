"""Charts of a comparison's page: curves over an axis, bars of a setting, differences with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scinet.report.matplotlib_drawing import drawing, panels, to_svg
from scinet.report.rendering import COLOURS, chart_label

_GREY = "#8c8c8c"
_COLOURED = (COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[3])
_MARKERS = "os^D"
_LINE_INCHES = 0.155  # of a label
_LONGEST_LABEL = 30
_MOST_BESIDE = 4
_TICK_POINTS = 7.5  # six values of four digits stay apart in a panel


@dataclass(frozen=True)
class Curve:
    """A method's means over an axis, NaN where there is none, and the limits of its band; all [points] float64."""

    method: str
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def curve_chart(
    curves: Sequence[Curve], highlighted: Sequence[str], axis: str, *, is_share: bool, unchanged: float | None = None
) -> bytes | None:
    """Draw a curve for each method, named at its end, with its band where it is highlighted.

    Args:
        curves: of the methods; those with fewer than two points are left out.
        highlighted: at most four methods, drawn in colour; the others stand back in grey.
        axis: its name.
        is_share: whether the axis is a share, shown in per cent.
        unchanged: where on the axis the first method stands as it is, if anywhere.
    """
    shown = [curve for curve in curves if np.isfinite(curve.mean).sum() > 1]
    if not shown:
        return None
    with drawing(9.2, max(4.2, _LINE_INCHES * len(shown) * 1.12 + 1.0)) as (figure, axes):
        for curve in sorted(shown, key=lambda curve: _place(curve.method, highlighted), reverse=True):
            look = _look(curve.method, highlighted)
            axes.plot(curve.x, curve.mean, **look, zorder=3 if curve.method in highlighted else 2)
            if curve.method in highlighted:
                axes.fill_between(
                    curve.x, curve.low, curve.high, color=look["color"], alpha=0.15, linewidth=0, zorder=1
                )
        _mark_unchanged(axes, unchanged)
        axes.set(xlabel=axis, ylabel="test mAP, %")
        places = sorted({float(x) for curve in shown for x in curve.x})
        axes.set_xticks(places, [f"{100 * x:g} %" if is_share else f"{x:g}" for x in places])
        axes.margins(x=0.02, y=0.05)
        _name_ends(axes, shown, highlighted, places[-1])
        return to_svg(figure)


@dataclass(frozen=True)
class Panel:
    """The curves over one of several axes, and where on it the first method stands as it is, if anywhere."""

    axis: str
    curves: Sequence[Curve]
    unchanged: float | None


def panel_chart(
    shown: Sequence[Panel], highlighted: Sequence[str], label: str, *, has_zero: bool = False
) -> bytes | None:
    """Draw a small panel for each axis, all with the same height of a point; values stand side by side, evenly.

    Args:
        shown: of the axes.
        highlighted: at most four methods, drawn in colour.
        label: of the heights.
        has_zero: whether a line marks the height 0.
    """
    num_columns = min(_MOST_BESIDE, len(shown))
    num_rows = -(-len(shown) // max(1, num_columns))
    if not shown:
        return None
    with panels(9.2, 2.2 * num_rows + 0.5, num_rows, num_columns) as (figure, all_axes):
        for axes, panel in zip(all_axes, shown, strict=False):
            values = sorted({float(x) for curve in panel.curves for x in curve.x})
            for curve in reversed(panel.curves):
                look = _look(curve.method, highlighted)
                places = [values.index(float(x)) for x in curve.x]
                axes.plot(places, curve.mean, **look, label=chart_label(curve.method, limit=_LONGEST_LABEL))
                axes.fill_between(places, curve.low, curve.high, color=look["color"], alpha=0.15, linewidth=0)
            if has_zero:
                axes.axhline(0, color=COLOURS[0], linewidth=1.4)
            _mark_unchanged(axes, None if panel.unchanged is None else values.index(panel.unchanged))
            axes.set_xticks(range(len(values)), [f"{x:g}" for x in values], fontsize=_TICK_POINTS)
            axes.set_xlabel(chart_label(panel.axis, limit=_LONGEST_LABEL))
        for axes in all_axes[len(shown) :]:
            axes.set_visible(False)
        for axes in all_axes[::num_columns]:
            axes.set_ylabel(label)
        if has_zero or len(shown[0].curves) > 1:
            figure.legend(*_legend(all_axes[0]), loc="outside lower center", ncols=_MOST_BESIDE, frameon=False)
        return to_svg(figure)


def _mark_unchanged(axes: Any, place: float | None) -> None:
    if place is not None:
        axes.axvline(place, color="#555555", linewidth=0.9, linestyle=":")


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return handles[::-1], labels[::-1]


def _name_ends(axes: Any, curves: Sequence[Curve], highlighted: Sequence[str], right: float) -> None:
    """Write each method's name right of the axes at the height of its end, moved apart where names would overlap."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    left = axes.get_xlim()[0]
    # what constrained layout leaves of the figure's height to the axes
    gap = _LINE_INCHES * (high - low) / (axes.figure.get_size_inches()[1] - 0.85)
    ends = []
    for curve in curves:
        last = int(np.flatnonzero(np.isfinite(curve.mean))[-1])
        ends.append((float(curve.mean[last]), float(curve.x[last]), curve.method))
    ends.sort()
    heights = spread([end[0] for end in ends], gap, low, high)
    start = right + 0.015 * (right - left)
    stop = right + 0.05 * (right - left)
    axes.set_xlim(left, right + 0.012 * (right - left))
    for height, (y, x, method) in zip(heights, ends, strict=True):
        is_bold = method in highlighted
        colour = _look(method, highlighted)["color"]
        axes.plot([x, start, stop], [y, y, height], color=colour, linewidth=0.6, clip_on=False)
        axes.annotate(
            f"{chart_label(method, limit=_LONGEST_LABEL)}  {y:.1f}",
            (stop, height),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            fontweight="bold" if is_bold else "normal",
            color=colour if is_bold else "#555555",
            annotation_clip=False,
        )


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return rising heights near the wanted ones, at least a gap apart, within the limits where they fit.

    Args:
        wanted: heights in rising order.
        gap: least distance.
        low: lower limit.
        high: upper limit.
    """
    groups: list[tuple[float, int]] = []  # middle and size of names that touch
    for height in wanted:
        groups.append((height, 1))
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (upper, more), (lower, fewer) = groups.pop(), groups.pop()
            size = more + fewer
            groups.append(((upper * more + lower * fewer) / size, size))
    heights = [middle + gap * (place - (size - 1) / 2) for middle, size in groups for place in range(size)]
    if heights and heights[0] < low:
        for place, height in enumerate(heights):
            heights[place] = max(height, low + gap * place)
    if heights and heights[-1] > high:
        for place in range(len(heights)):
            heights[-1 - place] = min(heights[-1 - place], high - gap * place)
    return heights


def bar_chart(rows: Sequence[dict[str, Any]], highlighted: Sequence[str]) -> bytes | None:
    """Draw the means of one column as bars, best on top, with one standard deviation as a whisker.

    Args:
        rows: of the column, with ``method``, ``mean`` and ``std``; those without a mean are left out.
        highlighted: methods drawn in colour.
    """
    shown = sorted((row for row in rows if row["mean"] is not None), key=lambda row: row["mean"])
    if not shown:
        return None
    with drawing(5.6, 0.24 * len(shown) + 0.75) as (figure, axes):
        for place, row in enumerate(shown):
            colour = _look(row["method"], highlighted)["color"]
            colour = colour if row["method"] in highlighted else "#bdbdbd"
            axes.barh(place, row["mean"], 0.72, color=colour, xerr=row["std"], error_kw={"linewidth": 0.9})
            end = row["mean"] + (row["std"] or 0.0)
            axes.annotate(
                f"{row['mean']:.1f}", (end, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
            )
        _name_rows(axes, [row["method"] for row in shown], highlighted)
        axes.set(xlabel="test mAP, %", xlim=(0, 1.1 * max(row["mean"] + (row["std"] or 0.0) for row in shown)))
        axes.grid(visible=False, axis="y")
        return to_svg(figure)


def difference_chart(
    columns: dict[str, Sequence[dict[str, Any]]], first: str, highlighted: Sequence[str]
) -> bytes | None:
    """Draw how far each method is from the first, with the 95 % interval over test images, columns side by side.

    Args:
        columns: by name their rows, with ``method`` and ``difference``; the first column says which methods are
            shown, best on top, and those without a difference are left out.
        first: the method that the others are held to, which is the zero line.
        highlighted: methods drawn in colour.
    """
    ranked = [row for row in next(iter(columns.values())) if row["difference"]]
    methods = [row["method"] for row in sorted(ranked, key=lambda row: row["difference"]["mean"])]
    if not methods:
        return None
    with panels(9.2, 0.24 * len(methods) + 0.95 + 0.2 * (len(columns) > 1), 1, len(columns)) as (figure, all_axes):
        for axes, (name, rows) in zip(all_axes, columns.items(), strict=True):
            axes.axvline(0, color=COLOURS[0], linewidth=1.4)
            for row in rows:
                if row["method"] in methods and row["difference"]:
                    _draw_interval(axes, row, methods.index(row["method"]), highlighted)
            axes.xaxis.set_major_formatter("{x:+g}")
            if len(columns) > 1:
                axes.set_title(chart_label(name, limit=_LONGEST_LABEL), fontsize=9)
        _name_rows(all_axes[0], methods, highlighted)
        all_axes[0].set_ylim(-0.7, len(methods) - 0.3)
        figure.supxlabel(f"test mAP minus that of {chart_label(first)}, points", fontsize=9)
        return to_svg(figure)


def _draw_interval(axes: Any, row: dict[str, Any], place: int, highlighted: Sequence[str]) -> None:
    found = row["difference"]
    is_told = not found["low"] <= 0 <= found["high"]
    colour = _look(row["method"], highlighted)["color"] if row["method"] in highlighted else "#555555"
    axes.plot([found["low"], found["high"]], [place, place], color=colour, linewidth=1.8)
    axes.plot(found["mean"], place, "o", color=colour, markerfacecolor=colour if is_told else "#ffffff", markersize=5.5)


def _name_rows(axes: Any, methods: Sequence[str], highlighted: Sequence[str]) -> None:
    axes.set_yticks(range(len(methods)), [chart_label(method, limit=_LONGEST_LABEL) for method in methods], fontsize=8)
    for label, method in zip(axes.get_yticklabels(), methods, strict=True):
        if method in highlighted:
            label.set(fontweight="bold", color=_look(method, highlighted)["color"])
    axes.tick_params(axis="y", length=0)


def _place(method: str, highlighted: Sequence[str]) -> int:
    return highlighted.index(method) if method in highlighted else len(highlighted)


def _look(method: str, highlighted: Sequence[str]) -> dict[str, Any]:
    place = _place(method, highlighted)
    if place == len(highlighted):
        return {"color": _GREY, "linewidth": 0.8, "marker": ".", "markersize": 3.5}
    return {
        "color": _COLOURED[place],
        "linewidth": 2.6 if place == 0 else 1.6,
        "marker": _MARKERS[place],
        "markersize": 5,
    }
