"""The page of a data set is one safe file at any number of classes, and its figures are those of the shards."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scinet import inspecting
from scinet.data import census
from scinet.data.card import DataCard
from scinet.errors import ConfigError, DataError
from scinet.report.data_page import class_rows, split_rows
from scinet.texttable import size
from tests.scinet.conftest import RawSample, build_samples
from tests.scinet.report.test_page import parse

HOSTILE = ['<script>alert("1")</script>', "$\\frac{1}{2}$ & \u202e\x1b[31m", "x" * 300, "図書館", "{{ 7 * 7 }}", "]]>"]


def _build(out: Path, num_classes: int, num_samples: int = 24) -> DataCard:
    names = [*HOSTILE, *(f"class {c}" for c in range(num_classes))][:num_classes]
    buffer = io.BytesIO()
    Image.new("RGB", (900, 700), (200, 120, 40)).save(buffer, "JPEG")

    def samples() -> list[RawSample]:
        made = []
        for n in range(num_samples):
            positives = tuple(c for c in range(n % 4) if c < num_classes)
            negatives = tuple(c for c in (4, 5) if c < num_classes)
            split = "test" if n % 4 == 3 else "train"
            made.append(RawSample(f"<b>{n}</b>", buffer.getvalue(), "jpg", positives, negatives, split))
        return made

    source = {"name": "<i>them</i>", "missing": {"count": 3}, "url": "javascript:alert(1)"}
    return build_samples(samples(), out, name="a <b>&", class_names=names, source=source, holdout=0.0, shard_samples=5)


def _write(card: DataCard, path: Path, samples: int = 7) -> None:
    inspecting.write_page(card, path, samples, lambda *_: None)


@pytest.mark.parametrize("num_classes", [1, 2, 80, 312, 9605])
def test_page_is_one_safe_file_at_any_number_of_classes(tmp_path: Path, num_classes: int) -> None:
    card = _build(tmp_path / "data", num_classes)
    path = tmp_path / "page.html"
    _write(card, path)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["data", "page.html"]
    assert path.stat().st_size < 3e6
    page = parse(path)
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form", "a", "b", "i"}
        assert all((attributes.get(name) or "data:").startswith("data:") for name in ("src", "href", "srcset"))
        assert not any(name.startswith("on") for name in attributes)
    # every class is named, however many there are, and none is read as a template or as mark-up
    for name in card.class_names:
        assert name.replace("\x1b", "\ufffd") in page.text
    assert len(page.drawings) == (3 if num_classes > 1 else 2)
    for drawing in page.drawings:
        assert ElementTree.fromstring(drawing).tag.endswith("svg")
    assert len(page.images("image/jpeg")) == 7
    assert "<b>0</b>" in page.text
    assert "javascript:alert(1)" in page.text


def test_census_counts_labels_and_pairs(tmp_path: Path) -> None:
    card = _build(tmp_path / "data", 6)
    found = census.take(card, 3, lambda *_: None)
    # of each four samples three are for training with 0, 1 and 2 positives, the last has 3 and is a test sample
    assert found.label_counts["train"].tolist() == [6, 6, 6]
    assert found.label_counts["test"].tolist() == [0, 0, 0, 6]
    assert found.shown.tolist() == [0, 1, 2]
    assert found.together.tolist() == [[18, 12, 6], [12, 12, 6], [6, 6, 6]]
    assert found.conditional()[2].tolist() == [1.0, 1.0, 1.0]
    all_classes = census.take(card, 99, lambda *_: None)
    assert all_classes.judged[0].tolist() == [18, 12, 6, 0, 18, 18]
    assert np.isnan(all_classes.conditional()[0, 3])


def test_tables_hold_the_cards_figures(tmp_path: Path) -> None:
    card = _build(tmp_path / "data", 6)
    train = split_rows(card)[0]
    assert train[:6] == ("train", "18", "1.00", f"{18 / 54:.2%}", f"{54 / 108:.2%}", "4")
    rows = class_rows(card)
    assert [row.positives for row in rows] == [18, 12, 6, 0, 0, 0]
    assert (rows[0].bar, rows[-1].bar) == pytest.approx((100, 0))
    assert sum(row.negatives for row in rows) == 48


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (3 * 2**50, "3,072.0 TiB")],
)
def test_size_is_in_the_unit_that_suits_it(num_bytes: int, words: str) -> None:
    assert size(num_bytes) == words


def test_page_is_refused_when_it_cannot_be_written_or_a_shard_is_damaged(tmp_path: Path) -> None:
    card = _build(tmp_path / "data", 6)
    with pytest.raises(ConfigError, match="does not exist"):
        _write(card, tmp_path / "no" / "page.html")
    with pytest.raises(ConfigError, match="cannot write"):
        _write(card, tmp_path / "data")
    shard = card.shard_paths("train")[0]
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(DataError, match="train-000000"):
        _write(card, tmp_path / "page.html")
    assert [found.name for found in tmp_path.iterdir()] == ["data"]


def test_page_is_written_when_no_sample_is_asked_for(tmp_path: Path) -> None:
    card = _build(tmp_path / "data", 6)
    _write(card, tmp_path / "page.html", samples=0)
    assert "Samples" not in parse(tmp_path / "page.html").text
