"""The report page: whole, self-contained, safe against strange names, and complete when parts are missing."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scinet.evaluation.evaluator import Scores
from scinet.evaluation.metrics import evaluate
from scinet.options import Options
from scinet.report import Example, summary, write_report
from scinet.report.charts import line_chart, series
from scinet.report.page import judge
from scinet.report.rendering import chart_label
from scinet.rundir import RunDirectory
from tests.scinet.conftest import RawSample, build_samples

_VOID = {"meta", "img", "br", "hr", "link", "input"}


class PageParser(HTMLParser):
    """Collect the elements, the drawings and the text of a page, and check that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.drawings: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self, kind: str) -> list[bytes]:
        """Return the embedded images of one MIME type."""
        start = f"data:{kind};base64,"
        sources = [attributes["src"] or "" for tag, attributes in self.elements if tag == "img"]
        return [base64.b64decode(source.removeprefix(start)) for source in sources if source.startswith(start)]


def parse(path: Path) -> PageParser:
    """Parse a page to its end."""
    parser = PageParser()
    source = path.read_text(encoding="utf-8")
    parser.feed(source)
    parser.close()
    parser.drawings = re.findall("<svg .*?</svg>", source, re.DOTALL)
    assert parser.open == []
    return parser


def make_jpeg(width: int = 64, height: int = 48, **options: Any) -> bytes:
    """Return a small picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 120, 40)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def make_input(num_classes: int = 6, num_images: int = 40, **changes: Any) -> dict[str, Any]:
    """Return a complete input of `write_report` with some arguments replaced."""
    rng = np.random.default_rng(num_classes)
    truth = np.where(rng.random((num_images, num_classes)) < 0.4, 1, -1).astype(np.int8)
    scores = rng.random((num_images, num_classes)).astype(np.float32)
    given: dict[str, Any] = {
        "title": "A run",
        "summary": [("teacher mAP", "41.3"), ("chance", "5.9")],
        "history": [{"step": step, "samples_seen": 64 * step, "loss/total": 1 / (step + 1)} for step in range(20)],
        "class_names": [f"class number {index}" for index in range(num_classes)],
        "scores": scores,
        "truth": truth,
        "label_correlation": rng.uniform(-1, 1, (num_classes, num_classes)),
        "examples": [Example(make_jpeg(), "one.jpg", ["class number 0"], [("class number 0", 0.9)])],
        **changes,
    }
    evaluation = evaluate(torch.from_numpy(given["scores"]), torch.from_numpy(given["truth"])).to_json()
    return {"evaluation": evaluation, **given}


def test_page_is_self_contained_and_atomic_when_written(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "report"
    path = write_report(directory, **make_input())
    write_report(directory, **make_input())
    assert path == directory / "report.html"
    assert list(directory.iterdir()) == [path]
    page = parse(path)
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for name in ("src", "href", "srcset", "action", "poster", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert attributes["alt"]
        if attributes.get("role") == "img":
            assert attributes["aria-label"]
    assert "url(" not in path.read_text(encoding="utf-8")
    assert len(page.drawings) == 3  # losses, precision and recall, correlation
    assert sum(tag == "div" and attributes.get("role") == "img" for tag, attributes in page.elements) == 3
    for drawing in page.drawings:
        for element in ElementTree.fromstring(drawing).iter():
            assert not any(str(value).startswith("http") for value in element.attrib.values())


def test_nothing_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, **make_input(history=[], label_correlation=None, examples=[]))
    assert list(tmp_path.iterdir()) == []


def test_names_are_escaped_and_charts_well_formed_when_names_are_hostile(tmp_path: Path) -> None:
    names = [
        "<script>alert(1)</script>",
        "$x_{2$ & \\frac",
        "a\x00b\x1bc\ud800",
        '" onload="x',
        "café 猫 \u202e",
        "{{ 7 * 7 }}",
    ]
    example = Example(make_jpeg(), "<img src=x onerror=alert(1)>\udcff.jpg", names[:2], [(name, 0.7) for name in names])
    path = write_report(
        tmp_path,
        **make_input(class_names=names, examples=[example], title="</title><script>", summary=[("<b>", "<i>")]),
    )
    page = parse(path)
    assert "script" not in {tag for tag, _ in page.elements}
    for name in ("<script>alert(1)</script>", "$x_{2$ & \\frac", '" onload="x', "café 猫", "{{ 7 * 7 }}", "onerror="):
        assert name in page.text
    assert page.drawings
    for drawing in page.drawings:
        assert not any("script" in element.tag for element in ElementTree.fromstring(drawing).iter())


@pytest.mark.parametrize("num_classes", [1, 2, 46, 130])
def test_every_class_is_named_with_its_positives_when_there_are_many_or_one(num_classes: int, tmp_path: Path) -> None:
    given = make_input(num_classes)
    path = write_report(tmp_path, **given)
    page = parse(path)
    rows = page.text.split("Average precision of each class")[1].split("Precision and recall")[0]
    for name, count in zip(given["class_names"], (given["truth"] == 1).sum(0), strict=True):
        assert any(line.startswith(name) and line.endswith(str(count)) for line in rows.splitlines())
    assert ("80 most frequent of 130" in page.text) == (num_classes == 130)
    labels = {element.text for element in ElementTree.fromstring(page.drawings[-1]).iter()}
    assert len(labels & set(given["class_names"])) == min(num_classes, 80)


def test_page_is_small_when_examples_are_large_photographs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    noise = Image.fromarray(rng.integers(0, 255, (1200, 1600, 3), dtype=np.uint8))
    noise.save(buffer, "JPEG", quality=90, exif=exif)
    examples = [Example(buffer.getvalue(), f"{index}.jpg", [], []) for index in range(12)]
    path = write_report(tmp_path, **make_input(46, examples=examples))
    assert path.stat().st_size < 3_000_000
    pictures = parse(path).images("image/jpeg")
    assert len(pictures) == 12
    assert b"taken at home" not in pictures[0]
    assert max(Image.open(io.BytesIO(pictures[0])).size) <= 440


def test_page_says_so_when_an_image_is_broken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    examples = [Example(data, "bad.jpg", [], []) for data in (b"", b"junk", make_jpeg(300, 300)[:500])]
    page = parse(write_report(tmp_path, **make_input(examples=examples)))
    assert page.text.count("image cannot be decoded") == 3
    assert len(caplog.records) == 3
    assert "bad.jpg" in caplog.text


def test_page_is_complete_when_every_optional_part_is_missing(tmp_path: Path) -> None:
    truth = np.full((5, 3), -1, dtype=np.int8)
    given = make_input(3, 5, truth=truth, history=[], label_correlation=None, examples=[], summary=[])
    assert given["evaluation"]["per_class_average_precision"] == [None] * 3
    page = parse(write_report(tmp_path, **given))
    assert "No training history was recorded" in page.text
    assert all(name in page.text for name in given["class_names"])
    assert not any(tag == "img" for tag, _ in page.elements)
    assert "nan" not in page.text.lower()


def test_page_is_written_when_no_image_was_tested(tmp_path: Path) -> None:
    given = make_input(2, 0, label_correlation=np.full((2, 2), np.nan))
    assert "0 images, 2 classes" in parse(write_report(tmp_path, **given)).text


def test_page_says_so_when_the_truth_is_partial(tmp_path: Path) -> None:
    given = make_input()
    assert "partial" not in parse(write_report(tmp_path, **given)).text
    truth = given["truth"].copy()
    truth[::2] = 0
    assert "only known cells count" in parse(write_report(tmp_path, **make_input(truth=truth))).text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ["one"]}, "both be \\[images, 1\\]"),
        ({"label_correlation": np.zeros((2, 2))}, "label_correlation"),
        ({"evaluation": {}}, "per_class_average_precision of 6"),
        ({"evaluation": {"per_class_average_precision": [1.0]}}, "per_class_average_precision of 6"),
    ],
)
def test_write_report_says_what_is_wrong_when_shapes_differ(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path, **(make_input() | change))
    assert list(tmp_path.iterdir()) == []


def test_series_keeps_only_numbers_in_order_when_rows_are_ragged() -> None:
    rows = [json.loads(line) for line in ('{"step": 4, "a": 1.5}', '{"step": 2, "a": 3}', '{"a": 7}', '{"step": 9}')]
    rows += [{"step": 5, "a": float("nan")}, {"step": 6, "a": None}, {"step": 7, "a": "x"}, {"step": 8, "a": True}]
    axis, x, y = series(rows, "a")
    assert (axis, x.tolist(), y.tolist()) == ("steps", [2, 4], [3, 1.5])
    assert series([{"step": 1, "samples_seen": 64, "a": 2}], "a")[0] == "samples seen"
    assert line_chart(rows, {"b": "absent"}) is None


def test_curves_keep_their_mean_and_the_page_stays_small_when_history_is_long() -> None:
    rows = [{"step": step, "a": step % 2} for step in range(100_000)]
    drawing = line_chart(rows, {"a": "a metric", "b": "another"})
    assert drawing is not None
    assert len(drawing) < 60_000


def test_verdicts_follow_the_threshold_when_predictions_are_compared_with_truth() -> None:
    predicted = [("cat", 0.9), ("dog", 0.6), ("cow", 0.5), ("bird", 0.2)]
    verdicts = judge(Example(b"", "x", ["cat", "cow", "horse", "horse"], predicted))
    assert [(verdict.kind, verdict.name, verdict.probability) for verdict in verdicts] == [
        ("correct", "cat", 0.9),
        ("wrong", "dog", 0.6),
        ("missed", "cow", 0.5),
        ("missed", "horse", None),
        ("unlikely", "bird", 0.2),
    ]


def test_verdicts_carry_a_sign_and_a_word_when_shown(tmp_path: Path) -> None:
    example = Example(make_jpeg(), "x", ["cat", "horse"], [("cat", 0.9), ("dog", 0.6)])
    text = parse(write_report(tmp_path, **make_input(examples=[example]))).text
    for shown in ("✓correct: cat90 %", "✗wrong: dog60 %", "○missed: horse"):
        assert shown in text


def test_chart_label_is_short_and_printable() -> None:
    assert chart_label("a" * 30, limit=10) == "a" * 9 + "…"
    assert chart_label("a\nb\ud800") == "a\ufffdb\ufffd"


def test_page_of_a_run_needs_neither_matplotlib_nor_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [RawSample(str(n), make_jpeg(), "jpg", (n % 2,), (1 - n % 2,), "test") for n in range(4)]
    card = build_samples(samples, tmp_path / "data", class_names=["cat", "dog"])
    truth = torch.tensor([[1, -1], [-1, 1]] * 2, dtype=torch.int8)
    scores = Scores(torch.tensor([[0.9, 0.2], [0.6, 0.7]] * 2), truth)
    evaluation = {"zero_shot": evaluate(scores.probabilities, truth).to_json()}
    history = make_input()["history"]
    for module in ("matplotlib", "torchvision"):
        monkeypatch.setitem(sys.modules, module, None)
    path = summary.write(RunDirectory(tmp_path), Options(), card, evaluation, history, scores, torch.eye(2))
    page = parse(path)
    assert len(page.drawings) == 3
    assert len(page.images("image/jpeg")) == 4
    assert "image cannot be decoded" not in page.text
