"""The page of a comparison: one HTML file that needs nothing else, neither network nor script."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scinet.report import comparison_charts as charts
from scinet.report.comparison_charts import Curve, Panel
from scinet.report.rendering import Chart, chart, chart_label, render, write_page

_NUM_COLOURED = 4
_MOST_CLASSES = 12
_MOST_DIFFERENCES = 5


def write(directory: Path, tree: dict[str, Any]) -> Path:
    """Write ``comparison.html`` into a comparison's folder, whole or not at all, and return its path.

    Args:
        directory: of the comparison.
        tree: what ``comparison.json`` holds.
    """
    rows = tree["tables"]["selected"]["rows"]
    ranked = [row for row in rows if row["column"] == tree["ranked_by"]]
    coloured = _coloured(tree, ranked)
    curves = _curves(tree, rows, coloured)
    gains = _axis_differences(tree, rows, coloured)
    differences = _differences(tree, rows)
    difference = chart(
        charts.difference_chart(differences, tree["first"], coloured), "Differences", _difference_alt(ranked)
    )
    page = render(
        "comparison_page.html.j2",
        tree=tree,
        summary=_summary(tree, ranked),
        coloured=coloured,
        curves=curves,
        gains=gains,
        bars=_bars(tree, rows, coloured),
        difference=difference,
        difference_columns=list(differences),
        tables=[_view(tree, moment, table) for moment, table in tree["tables"].items()],
        classes=_classes(tree["classes"]),
        beside=tree["beside"],
        num_orders=len({row["column"] for row in rows}) + 1,
        failed=[cell for cell in tree["cells"] if cell["state"] == "failed"],
    )
    path = directory / "comparison.html"
    write_page(path, page)
    for name, picture in (curves | {"axes-differences": gains, "differences": difference}).items():
        if picture is not None:
            picture.write(directory / f"comparison-{name}.svg")
    return path


def _differences(tree: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Sequence[dict[str, Any]]]:
    """Return the rows of the columns whose differences are drawn: all, where they are few, or that of the ranking."""
    names = _columns(tree, rows)
    names = names if len(names) <= _MOST_DIFFERENCES else names[:1]
    return {name: [row for row in rows if row["column"] == name] for name in names}


def _columns(tree: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of a table's columns, that of the ranking first."""
    return list(dict.fromkeys([tree["ranked_by"], *(row["column"] for row in rows)]))


def _coloured(tree: dict[str, Any], ranked: Sequence[dict[str, Any]]) -> list[str]:
    """Return the first method and the best of the others, which charts show in colour."""
    others = sorted(_rivals(tree, ranked), key=lambda row: -row["mean"])
    return [tree["first"], *(row["method"] for row in others)][:_NUM_COLOURED]


def _rivals(tree: dict[str, Any], ranked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of methods with a result that compete with the first: no ceiling does."""
    beside = (tree["first"], *tree["ceilings"])
    return [row for row in ranked if row["mean"] is not None and row["method"] not in beside]


def _summary(tree: dict[str, Any], ranked: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    first = next(row for row in ranked if row["method"] == tree["first"])
    tiles = [(f"{tree['first']}, {tree['ranked_by']}", _number(first["mean"]))]
    rivals = _rivals(tree, ranked)
    if rivals:
        best = max(rivals, key=lambda row: row["mean"])
        tiles.append((f"{best['method']}, the best of the others", _number(best["mean"])))
        if best["difference"]:
            low, high = (_signed(best["difference"][end]) for end in ("low", "high"))
            what = f"{best['method']} minus {tree['first']}; 95 % interval {low} to {high}"
            tiles.append((what, _signed(best["difference"]["mean"])))
    seeds = f"{len(tree['seeds'])}: {', '.join(map(str, tree['seeds']))}"
    tiles += [("Cells done", f"{tree['num_done']} of {tree['num_cells']}"), ("Seeds", seeds)]
    return tiles


def _curves(tree: dict[str, Any], rows: Sequence[dict[str, Any]], coloured: Sequence[str]) -> dict[str, Chart]:
    """Return by name a chart over the share of known labels, and one over the plan's own axes."""
    ratios = [column for column in tree["columns"] if column["known_ratio"] is not None]
    panels = [
        Panel(axis, _drawn(tree["methods"], rows, columns, _mean), _unchanged(columns))
        for axis, columns in _axes(tree).items()
    ]
    known = charts.curve_chart(
        _drawn(tree["methods"], rows, ratios, _mean), coloured, "share of labels known", is_share=True
    )
    if len(panels) == 1:
        only = panels[0]
        svg = charts.curve_chart(only.curves, coloured, only.axis, is_share=False, unchanged=only.unchanged)
    else:
        svg = charts.panel_chart(panels, coloured, "test mAP, %")
    over = ", ".join(panel.axis for panel in panels)
    drawn = {
        "known-ratio": chart(known, "Test mAP over the share of labels known", _alt("share of labels known")),
        "axes": chart(svg, f"Test mAP over {over}", _alt(over)),
    }
    return {name: found for name, found in drawn.items() if found is not None}


def _alt(axis: str) -> str:
    return f"Test mAP of each method over {axis}; the table has the values"


def _axis_differences(tree: dict[str, Any], rows: Sequence[dict[str, Any]], coloured: Sequence[str]) -> Chart | None:
    """Return a chart of how far each method is from the first over the plan's own axes; None without another method."""
    others = [method for method in tree["methods"] if method != tree["first"]]
    if not others:
        return None
    panels = [
        Panel(axis, _drawn(others, rows, columns, _paired), _unchanged(columns))
        for axis, columns in _axes(tree).items()
    ]
    svg = charts.panel_chart(panels, coloured, f"minus {chart_label(tree['first'])}, points", has_zero=True)
    over = ", ".join(panel.axis for panel in panels)
    alt = f"Test mAP of each method minus that of {tree['first']} over {over}; the table has the values"
    return chart(svg, f"Differences from {tree['first']} over {over}", alt)


def _axes(tree: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return by name the plan's own axes, each with its columns."""
    axes: dict[str, list[dict[str, Any]]] = {}
    for column in tree["columns"]:
        if column["axis"]:
            axes.setdefault(column["axis"], []).append(column)
    return axes


def _unchanged(columns: Sequence[dict[str, Any]]) -> float | None:
    return next((column["place"] for column in columns if column["is_unchanged"]), None)


_Limits = tuple[float, float, float]


def _mean(row: dict[str, Any]) -> _Limits:
    """Return a row's mean, and one standard deviation below and above it."""
    mean, deviation = math.nan if row["mean"] is None else row["mean"], row["std"] or 0.0
    return mean, mean - deviation, mean + deviation


def _paired(row: dict[str, Any]) -> _Limits:
    """Return a row's difference from the first method, with its interval."""
    found = row["difference"]
    return (found["mean"], found["low"], found["high"]) if found else (math.nan,) * 3


def _drawn(
    methods: Iterable[str],
    rows: Sequence[dict[str, Any]],
    columns: Sequence[dict[str, Any]],
    show: Callable[[dict[str, Any]], _Limits],
) -> list[Curve]:
    """Return a curve of each method over columns that stand on one axis."""
    columns = sorted(columns, key=lambda column: float(column["place"]))
    cells = {(row["method"], row["column"]): row for row in rows}
    x = np.array([column["place"] for column in columns], dtype=np.float64)
    curves = []
    for method in methods:
        shown = [show(cells[method, column["name"]]) for column in columns]
        curves.append(Curve(method, x, *np.array(shown, dtype=np.float64).reshape(-1, 3).T))
    return curves


def _bars(tree: dict[str, Any], rows: Sequence[dict[str, Any]], coloured: Sequence[str]) -> list[Chart]:
    """Return a chart for each column that no curve shows."""
    ratios = [column for column in tree["columns"] if column["known_ratio"] is not None]
    placed = [column for column in tree["columns"] if column["axis"]]
    on_curves = [column["name"] for columns in (ratios, placed) if len(columns) > 1 for column in columns]
    drawn = []
    for name in (column["name"] for column in tree["columns"]):
        if name not in on_curves:
            own = [row for row in rows if row["column"] == name]
            alt = ", ".join(f"{row['method']} {_number(row['mean'])}" for row in own)
            drawn.append(chart(charts.bar_chart(own, coloured), name, alt))
    return [found for found in drawn if found is not None]


def _difference_alt(ranked: Sequence[dict[str, Any]]) -> str:
    return "; ".join(f"{row['method']} {_interval(row['difference'])}" for row in ranked if row["difference"])


def _view(tree: dict[str, Any], moment: str, table: dict[str, Any]) -> dict[str, Any]:
    """Return a table as the template shows it: its rows ranked, each with its place in the order of every column."""
    columns = _columns(tree, table["rows"])
    methods = list(tree["methods"])
    cells = {(row["method"], row["column"]): row for row in table["rows"]}

    def order(key: Callable[[str], Any]) -> dict[str, int]:
        return {method: place for place, method in enumerate(sorted(methods, key=key))}

    def by(column: str) -> Callable[[str], Any]:
        return lambda method: -(cells[method, column]["mean"] or -math.inf)

    orders = [order(str.casefold), *(order(by(column)) for column in columns)]
    return {
        "moment": moment,
        "title": table["title"],
        "columns": columns,
        "has_differences": any(row["difference"] for row in table["rows"]),
        "rows": [
            {
                "method": method,
                "places": [own[method] for own in orders],
                "cells": [cells[method, column] for column in columns],
            }
            for method in sorted(methods, key=lambda method: orders[1][method])
        ],
    }


def _classes(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the classes that differ most either way, with bars that end at the largest difference."""
    if found is None:
        return None
    rows = found["rows"]
    half = _MOST_CLASSES // 2
    shown = rows if len(rows) <= _MOST_CLASSES else [*rows[:half], *rows[-half:]]
    largest = max(abs(row["difference"]) for row in shown) or 1.0
    bars = [row | {"bar": 100 * abs(row["difference"]) / largest} for row in shown]
    return {"other": found["other"], "rows": bars, "num_classes": len(rows)}


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _interval(found: dict[str, Any]) -> str:
    return f"{_signed(found['mean'])} [{_signed(found['low'])}, {_signed(found['high'])}]"
