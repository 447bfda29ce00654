"""The page of a comparison: self-contained, sortable without a script, legible with many methods."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from scinet.evaluation.comparison import scoring, training
from scinet.evaluation.comparison.plan import Cell
from scinet.report import comparison_page
from scinet.report.comparison_charts import spread
from tests.scinet.evaluation.comparison.fakes import make_entries, make_plan, make_test_set
from tests.scinet.report.test_page import PageParser, parse

TRUTH = make_test_set()
HOSTILE = "<script>alert(1)</script> $x_{2$ & café"


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "RESAMPLES", 20)


def _tree(folder: Path, methods: list[str], more: str, quality: Any = lambda cell: 0.3, peak: float = 70.0) -> Any:
    lines = "".join(f"  {name!r}: [train.epochs={place + 1}]\n" for place, name in enumerate(methods))
    wanted = make_plan(folder, f"output: out\nbase: base.yaml\nmethods:\n{lines}{more}\n")
    entries = make_entries(wanted, quality, TRUTH, peak=peak)
    return scoring.summarise(wanted, entries, {TRUTH.name: TRUTH})


def _page(folder: Path, *given: Any, **more: Any) -> PageParser:
    return parse(comparison_page.write(folder, _tree(folder, *given, **more)))


def _headings(page: PageParser) -> str:
    return page.text.replace("\n", " ")


def _labels(drawing: bytes) -> set[str]:
    return {(element.text or "").strip() for element in ElementTree.fromstring(drawing).iter()}


def test_page_is_self_contained_and_escapes_names_when_they_are_hostile(tmp_path: Path) -> None:
    more = "known_ratios: [0.1, 0.5]\nsettings: {'<b>': [data.single_positive=true]}\nseeds: [0]\ntest_peak: true"
    page = _page(tmp_path, [HOSTILE, "other"], more)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "form", "b"}
    assert HOSTILE in page.text
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    for drawing in page.images("image/svg+xml"):
        assert not any("script" in element.tag for element in ElementTree.fromstring(drawing).iter())


def test_selected_last_and_peak_are_separate_tables_and_the_peak_says_what_it_is(tmp_path: Path) -> None:
    more = "known_ratios: [0.1]\nseeds: [0]\n"
    without = _page(tmp_path, ["a", "b"], more)
    assert "Test-set peak" not in without.text
    page = _page(tmp_path, ["a", "b"], more + "test_peak: true")
    titles = ["Test mAP at the epoch that the hold-out selects", "Test mAP at the last epoch", "Test-set peak"]
    places = [page.text.index(title) for title in titles]
    assert places == sorted(places)
    assert "No result: it picks each cell's epoch by the test images" in _headings(page)
    assert "70.00" not in page.text[: places[2]]


def test_rows_are_ordered_by_every_column_without_a_script(tmp_path: Path) -> None:
    quality = {"a": (0.1, 0.3), "b": (0.25, 0.05), "c": (0.2, 0.6)}

    def of(cell: Cell) -> float:
        return quality[cell.method][cell.column.known_ratio == 0.5]

    path = comparison_page.write(tmp_path, _tree(tmp_path, ["a", "b", "c"], "known_ratios: [0.1, 0.5]\nseeds: [0]", of))
    text = path.read_text()
    rows = re.findall(r'style="([^"]*)"><th scope="row" role="rowheader"><bdi>(\w)</bdi>', text)[:3]
    found = {method: dict(place.split(":") for place in style.strip(";").split(";")) for style, method in rows}
    orders = ["".join(sorted("abc", key=lambda method: found[method][f"--o{place}"])) for place in range(4)]
    # by name, by the mean over ratios, by each ratio
    assert orders == ["abc", "cab", "bca", "cab"]
    assert "".join(method for _, method in rows) == "cab"
    for place in range(4):
        assert f'.sortable:has(input[value="{place}"]:checked) tbody tr {{ order: var(--o{place}); }}' in text


def test_every_method_is_named_at_its_curve_when_there_are_many(tmp_path: Path) -> None:
    methods = [f"method {number}" for number in range(22)]
    more = "known_ratios: [0.1, 0.5, 0.9]\naxes: {noise: {0: [], 0.2: [data.shuffle_window=1]}}\nseeds: [0]"
    page = _page(tmp_path, methods, more, lambda cell: 0.3 + 0.001 * int(cell.method.split()[1]))
    ratios, noise, _, differences = page.images("image/svg+xml")
    for drawing in (ratios, noise):
        assert all(any(label.startswith(f"{name} ") for label in _labels(drawing)) for name in methods)
    assert {"10 %", "50 %", "90 %", "share of labels known"} <= _labels(ratios)
    assert {"0", "0.2", "noise"} <= _labels(noise)
    assert set(methods[1:]) <= _labels(differences)
    assert "method 0" not in _labels(differences)


def test_axes_are_panels_of_one_picture_when_there_are_several(tmp_path: Path) -> None:
    axes = "axes: {mu: {0: [fusion.momentum=0], 0.8: [fusion.momentum=0.8]}, '<K>': {1: [loss.hard_k=1], 5: []}}"
    page = _page(tmp_path, ["a", "b"], f"{axes}\nseeds: [0, 1]")
    panels, gains, differences = page.images("image/svg+xml")
    assert {"mu", "<K>", "0", "0.8", "1", "5", "a", "b", "test mAP, %"} <= _labels(panels)
    assert {"mu 0", "mu 0.8", "<K> 1", "<K> 5"} <= _labels(differences)
    assert "A dotted line: its own value" in _headings(page)
    assert {"mu", "<K>", "0", "0.8", "1", "5", "b", "minus a, points"} <= _labels(gains)
    assert "a" not in _labels(gains)
    for name, drawing in (("axes", panels), ("axes-differences", gains), ("differences", differences)):
        written = (tmp_path / f"comparison-{name}.svg").read_bytes()
        assert written.replace(b' style="background:#ffffff"', b"", 1) == drawing != written


@pytest.mark.parametrize(("own", "is_marked"), [("0.5", False), ("0.8", True)])
def test_own_value_is_marked_when_it_stands_on_the_only_axis(tmp_path: Path, own: str, is_marked: bool) -> None:
    axes = f"axes: {{mu: {{0: [fusion.momentum=0], {own}: [fusion.momentum={own}]}}}}"
    page = _page(tmp_path, ["a"], f"{axes}\nseeds: [0, 1]")
    (drawing,) = page.images("image/svg+xml")
    assert (b"stroke: #555555" in drawing) == is_marked
    assert ("A dotted line: its own value" in _headings(page)) == is_marked


def test_differences_over_axes_are_those_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}

    def keep(shown: Any, highlighted: Any, label: str, **more: Any) -> None:
        drawn[label] = shown

    monkeypatch.setattr(comparison_page.charts, "panel_chart", keep)
    axes = "axes: {x: {1: [loss.hard_k=1], 0: [loss.hard_k=2]}, y: {0: [], 1: [loss.hard_k=3]}}\nseeds: [0, 1]"

    def quality(cell: Cell) -> float | None:
        return None if (cell.method, cell.column.name) == ("b", "y 1") else 0.4 - 0.2 * (cell.method == "b")

    tree = _tree(tmp_path, ["a", "b"], axes, quality)
    comparison_page.write(tmp_path, tree)
    found = {(r["method"], r["column"]): r["difference"] for r in tree["tables"]["selected"]["rows"]}
    over_x, over_y = drawn["minus a, points"]
    (curve,) = over_x.curves
    assert (curve.method, list(curve.x)) == ("b", [0, 1])
    for place, name in enumerate(("x 0", "x 1")):
        told = found["b", name]
        assert (curve.mean[place], curve.low[place], curve.high[place]) == (told["mean"], told["low"], told["high"])
    assert curve.high.max() < 0
    (curve,) = over_y.curves
    assert list(curve.mean == curve.mean) == [True, False]  # a column that failed has a gap


def test_settings_are_bars_and_so_is_a_single_ratio(tmp_path: Path) -> None:
    more = "known_ratios: [0.1]\nsettings: {single positive: [data.single_positive=true]}\nseeds: [0, 1]"
    page = _page(tmp_path, ["a", "b"], more)
    captions = [attributes["alt"] for tag, attributes in page.elements if tag == "img"]
    assert len(captions) == 3  # differences and two of bars
    assert all(caption and caption.startswith("a ") for caption in captions[1:])


def test_page_says_what_is_missing_when_cells_failed(tmp_path: Path) -> None:
    def quality(cell: Cell) -> float | None:
        return None if (cell.method, cell.seed) == ("b", 1) else 0.3

    page = _page(tmp_path, ["a", "b"], "known_ratios: [0.1, 0.5]\nseeds: [0, 1]", quality)
    assert "Failed and missing below, 2 of 8 cells" in _headings(page)
    assert "b, 10% known, seed 1 (it broke)" in page.text
    assert "(1 of 2)" in page.text


@pytest.mark.parametrize("methods", [["a"], ["a", "b"]])
def test_page_is_written_when_nothing_ran_or_nothing_is_compared(tmp_path: Path, methods: list[str]) -> None:
    for quality in (lambda _: None, lambda _: 0.3):
        page = _page(tmp_path, methods, "known_ratios: [0.1, 0.5]\nseeds: [0]", quality)
        assert "nan" not in page.text.lower()


def test_page_warns_when_cells_come_from_different_worlds(tmp_path: Path) -> None:
    tree = _tree(tmp_path, ["a"], "known_ratios: [0.1]\nseeds: [0]")
    assert "different devices" not in parse(comparison_page.write(tmp_path, tree)).text
    tree["worlds"].append("H100, torch 2")
    assert "different devices" in parse(comparison_page.write(tmp_path, tree)).text


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([], []),
        ([1.0, 5.0], [1.0, 5.0]),
        ([5.0, 5.0], [4.5, 5.5]),
        ([4.0, 4.2, 4.4, 9.0], [3.2, 4.2, 5.2, 9.0]),
        ([0.0, 0.0, 0.0], [0.0, 1.0, 2.0]),
        ([10.0, 10.0], [9.0, 10.0]),
    ],
)
def test_names_stand_apart_and_near_their_curves_within_the_limits(wanted: list[float], expected: list[float]) -> None:
    assert spread(wanted, 1.0, 0.0, 10.0) == pytest.approx(expected)
