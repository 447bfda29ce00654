"""The page of a sweep: one HTML file that needs nothing else, neither network nor script."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from scinet.report import sweep_charts
from scinet.report.rendering import chart, render, write_page


def write(directory: Path, tree: dict[str, Any]) -> Path:
    """Write ``sweep.html`` into a sweep's folder, whole or not at all, and return its path.

    Args:
        directory: of the sweep.
        tree: what ``sweep.json`` holds.
    """
    trials = tree["trials"]
    search = [trial for trial in trials if trial["purpose"] == "search"]
    by_number = {trial["number"]: trial for trial in trials}
    best, default = by_number[tree["best"]], by_number[tree["default"]]
    page = render(
        "sweep_page.html.j2",
        tree=tree,
        summary=_summary(tree, search, best, default),
        parallel=chart(
            sweep_charts.parallel_chart(search, tree["space"], tree["log"], tree["best"]),
            "Parameters and hold-out mAP",
            f"{len(search)} trials as lines over {len(tree['space'])} options and the hold-out mAP; the table has them",
            is_wide=True,
        ),
        progress=chart(
            sweep_charts.progress_chart(search),
            "Best so far",
            f"Hold-out mAP by trial; best {_map(best['holdout_map'])}, default {_map(default['holdout_map'])}",
        ),
        importance=chart(
            sweep_charts.importance_chart(tree["importance"]),
            "Importance",
            ", ".join(f"{key} {share:.2f}" for key, share in tree["importance"].items()),
        ),
        ranked=sorted(search, key=lambda trial: (trial["holdout_map"] is None, -(trial["holdout_map"] or 0.0))),
        confirmed=_confirmed(tree, by_number),
        num_seeds=max((len(values) for values in tree["confirmed"].values()), default=0),
    )
    path = directory / "sweep.html"
    write_page(path, page)
    return path


def _summary(
    tree: dict[str, Any], search: list[dict[str, Any]], best: dict[str, Any], default: dict[str, Any]
) -> list[tuple[str, str]]:
    states = [trial["state"] for trial in search]
    rows = [
        (f"Hold-out mAP, trial {best['number']} (best)", _map(best["holdout_map"])),
        ("Hold-out mAP, default", _map(default["holdout_map"])),
    ]
    for name, trial in (("best", best), ("default", default)):
        values = tree["confirmed"].get(trial["number"], [])
        if values:
            rows.append((f"Mean over {len(values)} other seed(s), {name}", _map(statistics.fmean(values))))
    rows.append(("Trials: to the end, stopped, failed", " / ".join(str(states.count(s)) for s in _ENDS)))
    rows.append(("Time of all trials", f"{sum(trial['seconds'] for trial in tree['trials']) / 3600:.2f} h"))
    return rows


_ENDS = ("completed", "stopped", "failed")


def _confirmed(tree: dict[str, Any], by_number: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the trials that were trained again, best mean first."""
    rows = [
        {
            "number": number,
            "own": by_number[number]["holdout_map"],
            "others": values,
            "mean": statistics.fmean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else None,
        }
        for number, values in tree["confirmed"].items()
        if values
    ]
    return sorted(rows, key=lambda row: -row["mean"])


def _map(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"
