"""The drawings: what they show, their limits, and names as text."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scinet.report import data_charts
from scinet.report.charts import correlation_chart, line_chart, precision_recall_chart
from scinet.report.svg import look, scale


def _drawn(drawing: str | None) -> ElementTree.Element:
    assert drawing is not None
    return ElementTree.fromstring(drawing)


def _named(root: ElementTree.Element, tag: str) -> list[ElementTree.Element]:
    return list(root.iter(f"{{http://www.w3.org/2000/svg}}{tag}"))


def _texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in _named(root, "text")]


def _pixels(root: ElementTree.Element) -> np.ndarray:
    """Return the colours of a matrix, [C,C,3] uint8."""
    content = _named(root, "image")[0].attrib["href"].removeprefix("data:image/png;base64,")
    return np.array(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


def test_best_point_is_ringed_with_its_value_when_averages_are_drawn() -> None:
    rows = [{"step": step, "a": 40 + (step == 700)} for step in range(1000)]
    root = _drawn(line_chart(rows, {"a": "a metric"}, mark_best=True))
    (ring,) = _named(root, "circle")
    across = [float(place) for place in re.findall(r"[ML]([\d.]+),", _named(root, "path")[2].attrib["d"])]
    assert len(across) == 334
    assert float(ring.attrib["cx"]) == pytest.approx(across[0] + 0.7 * (across[-1] - across[0]), abs=2)
    assert float(ring.attrib["cy"]) > 0
    assert "best 41.00" in _texts(root)


def test_curves_differ_without_colour_and_are_named_below_the_axes() -> None:
    rows = [{"step": step, "a": step, "b": 2 * step, "c": 3 * step} for step in range(8)]
    root = _drawn(line_chart(rows, {"a": "one", "b": "two <b>", "c": "three"}))
    texts = {element.text: float(element.attrib["y"]) for element in _named(root, "text")}
    assert all(texts[name] > texts["steps"] for name in ("one", "two <b>", "three"))
    assert len({look(index, is_marked=True).dash for index in range(7)}) == 7
    assert len({look(index, is_marked=True).colour for index in range(7)}) == 7
    # the text and the axes have the page's colour
    assert root.attrib["fill"] == "currentColor"
    assert not any("fill" in element.attrib for element in _named(root, "text"))


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-3e-5, 1e-5, ["-0.00003", "-0.00002", "-0.00001", "0.00000", "0.00001"]),
        (0, 4e6, ["0", "1,000,000", "2,000,000", "3,000,000", "4,000,000"]),
        (0, 4e-9, ["0", "1e-09", "2e-09", "3e-09", "4e-09"]),
    ],
)
def test_ticks_are_round_and_hold_the_ends(low: float, high: float, words: list[str]) -> None:
    ticks = scale(np.array([low, high]), margin=0, num_steps=5).ticks
    assert [text.replace("\N{MINUS SIGN}", "-") for _, text in ticks] == words


@pytest.mark.parametrize("value", [0.0, 3.2, -7e-5, 5e-324, 1e308])
def test_chart_has_finite_places_and_ticks_when_values_are_extreme(value: float) -> None:
    for values in ((value,), (value, value), (value, -value)):
        root = _drawn(line_chart([{"step": step, "a": one} for step, one in enumerate(values)], {"a": "a"}))
        assert len(_texts(root)) > 2
        assert not any(re.search("nan|inf", " ".join(element.attrib.values())) for element in root.iter())


def test_steps_alone_are_marked_on_the_axis_when_there_are_few() -> None:
    rows = [{"step": step, "a": step} for step in (1, 2)]
    assert {"1", "2"} <= set(_texts(_drawn(line_chart(rows, {"a": "a"}))))
    assert "1.5" not in [text for _, text in scale(np.array([1, 2]), is_whole=True).ticks]


def test_precision_falls_in_steps_from_the_first_class() -> None:
    scores = np.array([[0.9], [0.8], [0.7], [0.6]], dtype=np.float32)
    truth = np.array([[1], [-1], [1], [-1]], dtype=np.int8)
    root = _drawn(precision_recall_chart(scores, truth, ["a < b & c"], [83.3]))
    assert {"a < b & c, AP 83.3", "all cells (micro)", "recall", "precision"} <= set(_texts(root))
    micro = _named(root, "path")[2].attrib
    assert micro["stroke"] == "currentColor"
    # precision 1 to recall 1/2, down to 1/2 there, up to 2/3 at the last positive; nothing after it
    start, *heights = re.findall(r"[,V]([\d.]+)H", micro["d"])
    top, half = float(start), float(heights[0])
    assert float(heights[1]) == pytest.approx(top + 2 / 3 * (half - top), abs=0.2)
    assert len(heights) == 2


def test_scale_of_correlations_is_symmetric_about_zero_and_nan_is_grey() -> None:
    matrix = np.array([[1.0, -0.5, 0.0], [0.2, 1.0, np.nan], [0.0, 0.25, 1.0]])
    pixels = _pixels(_drawn(correlation_chart(matrix, ["a", "b", "c"])))
    assert pixels[1, 2].tolist() == [0xBB] * 3
    assert pixels[0, 2].tolist() == [0xF7] * 3  # white at 0
    assert pixels[0, 1].tolist() == [0x05, 0x30, 0x61]  # the strongest off the diagonal has the darkest blue
    assert pixels[0, 0].tolist() == [0x67, 0x00, 0x1F]  # and the diagonal saturates


@pytest.mark.parametrize("num_classes", [1, 5, 80, 312])
def test_matrix_names_every_class_on_both_axes_and_stays_small(num_classes: int) -> None:
    names = [f"{index} " + "<&>\x00\x1b\ud800" + "x" * 300 for index in range(num_classes)]
    drawing = correlation_chart(np.random.default_rng(0).uniform(-1, 1, (num_classes, num_classes)), names)
    root = _drawn(drawing)
    assert drawing is not None
    assert len(drawing) < 300_000
    texts = _texts(root)
    for index in range(num_classes):
        assert sum(text.startswith(f"{index} <&>\ufffd") for text in texts) == 2
    assert max(map(len, texts)) == 22
    assert _pixels(root).shape == (num_classes, num_classes, 3)
    # 80 fit the width of the page, and letters stay as large as can be read
    assert num_classes > 80 or int(root.attrib["width"]) < 1160
    assert all(float(group.attrib.get("font-size", 9)) > 8 for group in _named(root, "g"))


def test_drawing_is_the_same_when_drawn_again() -> None:
    matrix = np.random.default_rng(0).uniform(-1, 1, (20, 20))
    names = [str(index) for index in range(20)]
    assert correlation_chart(matrix, names) == correlation_chart(matrix.copy(), names)


@pytest.mark.parametrize(
    ("counts", "words"), [([0, 0], ["0", "1"]), ([3, 0], ["0", "1"]), ([5, 2000, 0], ["0", "1", "10", "100", "1,000"])]
)
def test_frequencies_are_logarithmic_and_none_has_a_place(counts: list[int], words: list[str]) -> None:
    texts = _texts(_drawn(data_charts.frequency_chart(np.array(counts))))
    assert [text for text in texts if text in words][-len(words) :] == words


def test_bars_are_shares_of_each_split() -> None:
    counts: dict[str, Any] = {"train": np.array([0, 30, 10]), "test": np.array([5, 5]), "none": np.array([0])}
    root = _drawn(data_charts.label_count_chart(counts))
    assert {"train", "test"} <= set(_texts(root))
    assert "none" not in _texts(root)
    train = next(path.attrib for path in _named(root, "path") if path.attrib.get("fill") == "#0072B2")
    bottom, tops = re.findall(r"M[\d.]+,([\d.]+)V", train["d"])[0], re.findall(r"V([\d.]+)H", train["d"])
    none, most, least = (float(bottom) - float(top) for top in tops)
    assert none == 0
    assert most == pytest.approx(3 * least, abs=0.3)
