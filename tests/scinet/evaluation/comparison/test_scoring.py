"""Means, deviations, paired intervals and who is best, from cells that nobody trained."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from scinet.evaluation.comparison import scoring, tables, training
from scinet.evaluation.comparison.plan import Cell, Plan
from scinet.evaluation.comparison.scoring import MEAN, Entry
from scinet.evaluation.metrics import paired_bootstrap
from tests.scinet.evaluation.comparison.fakes import PLAN, make_entries, make_finished, make_plan, make_test_set

TRUTH = make_test_set()
THREE = PLAN.replace("  bce:", "  twin: [fusion.momentum=0.5]\n  bce:")


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "RESAMPLES", 50)


def _summary(wanted: Plan, entries: list[Entry]) -> dict[str, Any]:
    return scoring.summarise(wanted, entries, {TRUTH.name: TRUTH})


def _row(tree: dict[str, Any], method: str, column: str, moment: str = "selected") -> dict[str, Any]:
    rows = tree["tables"][moment]["rows"]
    return next(row for row in rows if (row["method"], row["column"]) == (method, column))


def _quality(cell: Cell) -> float:
    return {"scinet": 0.4, "twin": 0.4, "bce": 0.2}[cell.method] * (cell.column.known_ratio or 1.0)


def _value(entries: list[Entry], method: str, column: str, seed: int, moment: str = "selected") -> float:
    for entry in entries:
        if (entry.cell.method, entry.cell.column.name, entry.cell.seed) == (method, column, seed):
            assert entry.record is not None
            return entry.record.judgements[moment].mean_average_precision
    raise AssertionError


def test_table_has_mean_and_deviation_over_seeds_of_each_moment(tmp_path: Path) -> None:
    wanted = make_plan(tmp_path)
    entries = make_entries(wanted, _quality, TRUTH)
    tree = _summary(wanted, entries)
    for moment in ("selected", "last"):
        values = [_value(entries, "bce", "50% known", seed, moment) for seed in (0, 1)]
        row = _row(tree, "bce", "50% known", moment)
        assert row["num_seeds"] == 2
        assert row["mean"] == pytest.approx(statistics.fmean(values))
        assert row["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)  # of a sample, n - 1
    assert set(tree["tables"]) == {"selected", "last"}
    assert _row(tree, "bce", "50% known")["mean"] != _row(tree, "bce", "50% known", "last")["mean"]
    assert (tree["num_cells"], tree["num_done"], tree["first"], tree["ranked_by"]) == (8, 8, "scinet", MEAN)


def test_mean_over_ratios_leaves_settings_out(tmp_path: Path) -> None:
    wanted = make_plan(tmp_path, PLAN + "settings: {single: [data.single_positive=true]}\n")
    entries = make_entries(wanted, _quality, TRUTH)
    row = _row(_summary(wanted, entries), "bce", MEAN)
    by_seed = [
        statistics.fmean(_value(entries, "bce", column, seed) for column in ("10% known", "50% known"))
        for seed in (0, 1)
    ]
    assert (row["mean"], row["std"]) == pytest.approx((statistics.fmean(by_seed), statistics.stdev(by_seed)))


def test_difference_is_the_paired_bootstrap_of_the_predictions(tmp_path: Path) -> None:
    wanted = make_plan(tmp_path, PLAN.replace("[0, 1]", "[0]").replace("[0.1, 0.5]", "[0.5]"))
    tree = _summary(wanted, make_entries(wanted, _quality, TRUTH))
    found = _row(tree, "bce", "50% known")["difference"]
    bce, scinet = (make_finished(TRUTH, quality, 0).predictions["selected"] for quality in (0.1, 0.2))
    _, low, high = paired_bootstrap(bce, scinet, TRUTH.truth, samples=50)
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert found["mean"] == pytest.approx(_row(tree, "bce", "50% known")["mean"] - tree["cells"][0]["selected"])
    assert _row(tree, "scinet", "50% known")["difference"] is None
    assert tree["ranked_by"] == "50% known"


def test_difference_pools_seeds_by_drawing_the_images_once(tmp_path: Path) -> None:
    wanted = make_plan(tmp_path)
    entries = make_entries(wanted, _quality, TRUTH)
    found = _row(_summary(wanted, entries), "bce", "10% known")["difference"]
    vectors = {
        (entry.cell.method, entry.cell.seed): entry.record.judgements["selected"].resampled
        for entry in entries
        if entry.record and entry.cell.column.name == "10% known"
    }
    pooled = sum(vectors["bce", seed] - vectors["scinet", seed] for seed in (0, 1)) / 2
    assert found["num_seeds"] == 2
    assert found["low"] == pytest.approx(float(pooled.quantile(0.025)))  # type: ignore[union-attr]
    assert found["low"] < found["mean"] < found["high"] < 0


def test_best_is_marked_and_those_whose_interval_against_it_holds_zero(tmp_path: Path) -> None:
    wanted = make_plan(tmp_path, THREE)
    tree = _summary(wanted, make_entries(wanted, _quality, TRUTH))
    marks = {
        method: (_row(tree, method, "50% known")["is_best"], _row(tree, method, "50% known")["is_within_best"])
        for method in wanted.methods
    }
    assert marks == {"scinet": (True, False), "twin": (False, True), "bce": (False, False)}  # the first of equals


def test_ceiling_that_sees_all_labels_is_no_best_and_no_rival(tmp_path: Path) -> None:
    wanted = make_plan(tmp_path, THREE.replace("[fusion.momentum=0.5]", "[method=full_labels]"))
    tree = _summary(wanted, make_entries(wanted, lambda cell: 0.9 if cell.method == "twin" else _quality(cell), TRUTH))
    marks = {method: _row(tree, method, MEAN)["is_best"] for method in wanted.methods}
    assert marks == {"scinet": True, "twin": False, "bce": False}
    assert not any(row["is_within_best"] for row in tree["tables"]["selected"]["rows"] if row["method"] == "twin")
    assert (tree["ceilings"], tree["classes"]["other"]) == (["twin"], "bce")
    assert "twin sees all labels and does not compete." in tables.markdown(tree)


@pytest.mark.parametrize("others", ["", "  twin: [method=full_labels]\n"])
def test_method_without_a_rival_is_no_best(tmp_path: Path, others: str) -> None:
    wanted = make_plan(tmp_path, PLAN.replace("  bce: [method=bce]\n", others))
    tree = _summary(wanted, make_entries(wanted, _quality, TRUTH))
    assert not any(row["is_best"] for row in tree["tables"]["selected"]["rows"])
    assert "**" not in tables.markdown(tree)


def test_missing_cells_move_no_mean_and_make_nobody_best(tmp_path: Path) -> None:
    wanted = make_plan(tmp_path, THREE)

    def quality(cell: Cell) -> float | None:
        if cell.method == "twin" and (cell.column.name, cell.seed) == ("10% known", 1):
            return None
        return _quality(cell) + 0.2 * (cell.method == "twin")

    entries = make_entries(wanted, quality, TRUTH)
    tree = _summary(wanted, entries)
    row = _row(tree, "twin", "10% known")
    assert (row["num_seeds"], row["std"], row["is_best"]) == (1, None, False)
    assert row["mean"] == _value(entries, "twin", "10% known", 0)
    assert row["difference"]["num_seeds"] == 1
    assert row["difference"]["mean"] == pytest.approx(row["mean"] - _value(entries, "scinet", "10% known", 0))
    assert _row(tree, "twin", MEAN)["num_seeds"] == 1
    assert _row(tree, "twin", "50% known")["is_best"]
    assert [(cell["state"], cell["failure"]) for cell in tree["cells"] if cell["state"] != "done"] == [
        ("failed", "it broke")
    ]


def test_table_is_whole_when_nothing_ran(tmp_path: Path) -> None:
    wanted = make_plan(tmp_path)
    tree = scoring.summarise(wanted, make_entries(wanted, lambda _: None, TRUTH), {})
    assert all(row["mean"] is None and not row["is_best"] for row in tree["tables"]["selected"]["rows"])
    assert tree["classes"] is None


def test_nothing_is_paired_when_methods_were_tested_on_other_images(tmp_path: Path) -> None:
    wanted = make_plan(tmp_path)
    other = make_test_set(seed=9)
    mine, theirs = (make_entries(wanted, _quality, found) for found in (TRUTH, other))
    entries = [own if own.cell.method == "scinet" else his for own, his in zip(mine, theirs, strict=True)]
    tree = scoring.summarise(wanted, entries, {TRUTH.name: TRUTH, other.name: other})
    assert _row(tree, "bce", "10% known")["difference"] is None
    assert tree["classes"] is None


def test_columns_with_test_sets_of_their_own_are_paired_within_themselves(tmp_path: Path) -> None:
    wanted = make_plan(tmp_path)
    other = make_test_set(seed=9)
    mine, theirs = (make_entries(wanted, _quality, found) for found in (TRUTH, other))
    entries = [a if a.cell.column.known_ratio == 0.1 else b for a, b in zip(mine, theirs, strict=True)]
    tree = scoring.summarise(wanted, entries, {TRUTH.name: TRUTH, other.name: other})
    for column, own in (("10% known", TRUTH), ("50% known", other)):
        alone = scoring.summarise(wanted, make_entries(wanted, _quality, own), {own.name: own})
        assert _row(tree, "bce", column) == _row(alone, "bce", column)
        assert _row(tree, "bce", column)["difference"]["num_seeds"] == 2
    assert tree["test_sets"] == ["fakes: 60 images (2 such sets)"]
    assert tree["classes"] is None


def test_test_peak_is_a_table_of_its_own_without_intervals_when_it_is_asked_for(tmp_path: Path) -> None:
    wanted = make_plan(tmp_path, PLAN + "test_peak: true\n")
    tree = _summary(wanted, make_entries(wanted, _quality, TRUTH, peak=66.0))
    row = _row(tree, "bce", "10% known", "test_peak")
    assert (row["mean"], row["difference"]) == (66.0, None)
    assert _row(tree, "bce", "10% known")["mean"] != 66.0


def test_classes_are_those_of_the_first_against_the_best_other(tmp_path: Path) -> None:
    wanted = make_plan(tmp_path, THREE)
    entries = make_entries(wanted, _quality, TRUTH)
    found = _summary(wanted, entries)["classes"]
    assert found["other"] == "twin"
    assert [row["difference"] for row in found["rows"]] == [0.0] * 4
    found = _summary(make_plan(tmp_path), [entry for entry in entries if entry.cell.method != "twin"])["classes"]
    assert found["other"] == "bce"
    differences = [row["difference"] for row in found["rows"]]
    assert differences == sorted(differences, reverse=True)
    assert statistics.fmean(differences) > 0


def test_seed_that_a_later_column_lacks_has_no_part_in_the_mean(tmp_path: Path) -> None:
    wanted = make_plan(tmp_path)

    def quality(cell: Cell) -> float | None:
        return None if (cell.method, cell.column.name, cell.seed) == ("bce", "50% known", 1) else _quality(cell)

    entries = make_entries(wanted, quality, TRUTH)
    row = _row(_summary(wanted, entries), "bce", MEAN)
    own = [_value(entries, "bce", column, 0) for column in ("10% known", "50% known")]
    assert (row["num_seeds"], row["mean"]) == (1, pytest.approx(statistics.fmean(own)))
