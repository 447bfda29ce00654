"""The tables as Markdown and CSV."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from scinet.evaluation.comparison import scoring, tables, training
from tests.scinet.evaluation.comparison.fakes import PLAN, make_entries, make_plan, make_test_set

TRUTH = make_test_set()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(training, "RESAMPLES", 20)
    wanted = make_plan(tmp_path, PLAN.replace("  bce:", "  'a | b': [method=bce, train.epochs=2]\n  bce:"))
    entries = make_entries(wanted, lambda cell: None if (cell.method, cell.seed) == ("bce", 1) else 0.3, TRUTH)
    return scoring.summarise(wanted, entries, {TRUTH.name: TRUTH})


def test_markdown_shows_means_marks_and_missing_seeds(tree: dict[str, Any]) -> None:
    lines = tables.markdown(tree).splitlines()
    table = lines[lines.index("## Test mAP at the epoch that the hold-out selects") + 2 :][:5]
    assert len({len(line) for line in table}) == 1  # aligned
    scinet = next(row for row in tree["tables"]["selected"]["rows"] if row["method"] == "scinet")
    assert table[2].startswith(f"| scinet | **{scinet['mean']:.2f}** ± {scinet['std']:.2f} ")
    assert table[3].startswith("| a \\| b | ")
    assert "†" in table[3]
    assert "(1 of 2 seeds)" in table[4]
    assert "±" not in table[4]  # one seed has no deviation


def test_each_axis_is_a_table_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "RESAMPLES", 20)
    axes = "axes: {mu: {0.5: [fusion.momentum=0.5], 0.8: [fusion.momentum=0.8]}, 'K | k': {1: [loss.hard_k=1]}}\n"
    wanted = make_plan(tmp_path, PLAN + axes)
    made = scoring.summarise(wanted, make_entries(wanted, lambda _: 0.3, TRUTH), {TRUTH.name: TRUTH})
    text = tables.markdown(made)
    heads = [line for line in text.splitlines() if line.startswith("| method")]
    assert [[part.strip() for part in head.strip("| ").split(" | ")] for head in heads[:3]] == [
        ["method", "10% known", "50% known", scoring.MEAN],
        ["method, by mu", "0.5", "0.8 (own)"],
        ["method, by K \\| k", "1"],
    ]
    assert len(heads) == 12  # selected and last, each with its differences
    only = make_plan(tmp_path, PLAN.replace("known_ratios: [0.1, 0.5]\n", axes))
    made = scoring.summarise(only, make_entries(only, lambda _: 0.3, TRUTH), {TRUTH.name: TRUTH})
    assert "| method |" not in tables.markdown(made)


def test_differences_have_their_interval_and_leave_the_first_out(tree: dict[str, Any]) -> None:
    parts = tables.markdown(tree).split("difference from scinet")
    assert len(parts) == 3  # selected, last
    assert "| scinet" not in parts[1].partition("##")[0]
    assert "+0.00 [+0.00, +0.00]" in parts[1]


def test_csv_has_a_row_for_each_cell(tree: dict[str, Any]) -> None:
    rows = list(csv.DictReader(tables.to_csv(tree).splitlines()))
    assert len(rows) == 12
    assert rows[0]["method"] == "scinet"
    assert float(rows[0]["selected"]) == tree["cells"][0]["selected"]
    assert (rows[0]["state"], rows[0]["device"], rows[0]["test_peak"]) == ("done", "CPU", "")
    failed = [row for row in rows if row["state"] == "failed"]
    assert [(row["method"], row["seed"], row["selected"], row["failure"]) for row in failed] == [
        ("bce", "1", "", "it broke")
    ] * 2
