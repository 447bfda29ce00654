"""A comparison as text: Markdown that is aligned, so that a terminal can show it too, and CSV, one row a cell."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from scinet.texttable import printable

_MEAN = "Mean and standard deviation over seeds, in per cent."
_BEST = (
    " **Bold**: the best of a column; †: within its interval, that is, the paired bootstrap over test images (95 %) "
    "does not tell it from the best."
)
_CEILING = " {} sees all labels and does not compete."
_OWN = " (own): the value that the first method has itself."
_NONE = "\N{EN DASH}"
_COLUMNS = (
    *("method", "column", "known_ratio", "seed", "state", "selected", "last", "fused", "test_peak"),
    *("student", "holdout"),
    *("best_epoch", "num_epochs", "class_f1", "overall_f1", "seconds", "device", "key", "failure"),
)


def markdown(tree: dict[str, Any]) -> str:
    """Return the tables of a comparison; selected, last and test-set peak are never mixed."""
    return "\n".join(_parts(tree))


def _parts(tree: dict[str, Any]) -> Iterator[str]:
    yield f"# {_safe(tree['name'])}\n"
    yield f"{tree['num_done']} of {tree['num_cells']} cells; {', '.join(map(_safe, tree['test_sets'])) or 'no test'}.\n"
    others = [method for method in tree["methods"] if method != tree["first"]]
    for moment, table in tree["tables"].items():
        yield f"## {table['title']}\n"
        yield from _grids(tree, table["rows"], list(tree["methods"]), lambda row: _mean(row, len(tree["seeds"])))
        if moment == "test_peak":
            continue
        has_axes = any(column["axis"] for column in tree["columns"])
        ceilings = "".join(_CEILING.format(_safe(method)) for method in tree["ceilings"])
        has_rivals = len(tree["methods"]) - len(tree["ceilings"]) > 1
        yield _MEAN + _BEST * has_rivals + ceilings + _OWN * has_axes + "\n"
        if others:
            yield f"### {table['title']}: difference from {_safe(tree['first'])}, 95 % interval over test images\n"
            yield from _grids(tree, table["rows"], others, _difference)


def _grids(
    tree: dict[str, Any], rows: Sequence[dict[str, Any]], methods: Sequence[str], show: Callable[[dict[str, Any]], str]
) -> Iterator[str]:
    """Yield a table of the columns that stand on no axis, and one of each axis, its values side by side."""
    placed = {column["name"]: column for column in tree["columns"] if column["axis"]}
    plain = {name: name for name in (row["column"] for row in rows) if name not in placed}
    tables = {"method": plain} if plain else {}
    for name, column in placed.items():
        value = f"{column['place']:g}" + " (own)" * column["is_unchanged"]
        tables.setdefault(f"method, by {column['axis']}", {})[name] = value
    for corner, columns in tables.items():
        yield _grid(corner, columns, rows, methods, show)


def _grid(
    corner: str,
    columns: dict[str, str],
    rows: Sequence[dict[str, Any]],
    methods: Sequence[str],
    show: Callable[[dict[str, Any]], str],
) -> str:
    lines = [[_safe(corner), *map(_safe, columns.values())]]
    for method in methods:
        own = {row["column"]: row for row in rows if row["method"] == method}
        lines.append([_safe(method), *(show(own[column]) for column in columns)])
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns) + 1)]
    lines.insert(1, ["-" * width for width in widths])
    shown = ("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "".join(f"{line} |\n" for line in shown)


def _mean(row: dict[str, Any], num_seeds: int) -> str:
    if row["mean"] is None:
        return _NONE
    text = f"{row['mean']:.2f}"
    text = f"**{text}**" if row["is_best"] else text
    if row["std"] is not None:
        text += f" ± {row['std']:.2f}"
    if row["is_within_best"]:
        text += " †"
    return text if row["num_seeds"] == num_seeds else f"{text} ({row['num_seeds']} of {num_seeds} seeds)"


def _difference(row: dict[str, Any]) -> str:
    found = row["difference"]
    return _NONE if found is None else f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def _safe(text: str) -> str:
    return printable(text).replace("|", "\\|")


def to_csv(tree: dict[str, Any]) -> str:
    """Return a row for each cell; what it lacks stays empty."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(_COLUMNS)
    for cell in tree["cells"]:
        known = cell | {"device": cell.get("world", {}).get("device")}
        table.writerow(["" if known.get(name) is None else known[name] for name in _COLUMNS])
    return buffer.getvalue()
