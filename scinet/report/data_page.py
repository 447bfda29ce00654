"""The page of a data set, one HTML file without scripts: classes, labels an image, co-occurrence, samples, source.

Class names, ids, images and the source's description come from strangers: names are escaped, charts are images, and
photographs are decoded and encoded again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scinet.data.card import DataCard
from scinet.data.census import Census, positives_of
from scinet.data.images import IMAGE_FORMATS
from scinet.data.labels import Labels, parse_labels
from scinet.data.members import LABELS, stored_members
from scinet.report import data_charts
from scinet.report.rendering import Chart, chart, image_source, render, write_page
from scinet.texttable import size

_MOST_ROWS = 400
_FIRST_ROWS, _LAST_ROWS = 150, 50
_MOST_LABELS = 12
_LONGEST_VALUE = 2000


@dataclass(frozen=True)
class _ClassRow:
    rank: int
    name: str
    positives: int
    negatives: int
    bar: float  # per cent of the longest, on a logarithmic scale


@dataclass(frozen=True)
class _Picture:
    name: str
    split: str
    source: str | None
    positives: list[str]
    num_more: int
    num_negatives: int


def write_data_page(path: Path, card: DataCard, census: Census, num_samples: int) -> None:
    """Write the page whole or not at all.

    Args:
        path: of the HTML file.
        card: of the data set.
        census: of its labels.
        num_samples: images to show.

    Raises:
        OSError: if the file cannot be written.
        tarfile.TarError, ValueError: if a shard is damaged.
    """
    rows = class_rows(card)
    is_long = len(rows) > _MOST_ROWS
    page = render(
        "data_page.html.j2",
        card=card,
        splits=split_rows(card),
        frequencies=_frequencies(card),
        rows=rows[:_FIRST_ROWS] if is_long else rows,
        middle=rows[_FIRST_ROWS:-_LAST_ROWS] if is_long else [],
        last=rows[-_LAST_ROWS:] if is_long else [],
        label_counts=_label_counts(census),
        cooccurrence=_cooccurrence(card, census),
        num_shown=len(census.shown),
        pictures=list(_pictures(card, num_samples)),
        source=described(card),
    )
    write_page(path, page)


def split_rows(card: DataCard) -> list[tuple[str, ...]]:
    """Return a row of words for each split: name, images, labels an image, density, known cells, shards, size."""
    rows: list[tuple[str, ...]] = []
    for name, split in card.splits.items():
        positives, negatives = sum(split.num_positives), sum(split.num_negatives)
        cells = split.num_samples * card.num_classes
        rows.append(
            (
                name,
                f"{split.num_samples:,}",
                f"{positives / split.num_samples:.2f}" if split.num_samples else "",
                f"{split.label_density:.2%}",
                f"{(positives + negatives) / cells:.2%}" if cells else "",
                f"{len(split.shards):,}",
                size(sum(shard.num_bytes for shard in split.shards)),
            )
        )
    return rows


SPLIT_HEADER = ("split", "images", "labels an image", "positive", "known cells", "shards", "size")
"""Of `split_rows`; "positive" is the share among the known cells."""


def described(card: DataCard) -> list[tuple[str, str]]:
    """Return what the card says about the source and about missing images, as rows of name and value."""
    missing = card.missing
    counted = f"{missing.not_found:,} not found, {missing.broken:,} broken; {missing.file} lists them"
    return [*_flat(card.source), ("missing images", counted if missing.count else "none")]


def _flat(source: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return the card's source as (what, value), nested keys joined by dots, long values cut."""
    rows: list[tuple[str, str]] = []
    for key, value in source.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((f"{prefix}{key}", text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"))
    return rows


def class_rows(card: DataCard) -> list[_ClassRow]:
    """Return every class over all splits, most frequent first."""
    positives = positives_of(card)
    negatives = np.asarray(np.sum([split.num_negatives for split in card.splits.values()], axis=0, dtype=np.int64))
    longest = math.log1p(int(positives.max(initial=0))) or 1.0
    order = np.argsort(-positives, kind="stable").tolist()
    return [
        _ClassRow(
            rank,
            card.class_names[c],
            int(positives[c]),
            int(negatives[c]),
            100 * math.log1p(int(positives[c])) / longest,
        )
        for rank, c in enumerate(order, start=1)
    ]


def _frequencies(card: DataCard) -> Chart | None:
    positives = positives_of(card)
    svg = data_charts.frequency_chart(positives)
    quartiles = np.percentile(positives, [0, 25, 50, 75, 100]).round().astype(int).tolist()
    words = ", ".join(f"{value:,}" for value in quartiles)
    never = int((positives == 0).sum())
    alt = f"Positives of {card.num_classes:,} classes; least, quartiles and most: {words}; {never} have none"
    return chart(svg, "Class frequencies", alt, is_wide=False)


def _label_counts(census: Census) -> Chart | None:
    svg = data_charts.label_count_chart(census.label_counts)
    means = [
        f"{name} {(np.arange(len(counts)) * counts).sum() / counts.sum():.2f}, at most {len(counts) - 1}"
        for name, counts in census.label_counts.items()
        if counts.sum()
    ]
    return chart(svg, "Labels an image", f"Positive labels of an image, mean: {'; '.join(means)}")


def _cooccurrence(card: DataCard, census: Census) -> Chart | None:
    names = [card.class_names[c] for c in census.shown]
    svg = data_charts.cooccurrence_chart(census.conditional(), names)
    return chart(svg, "Classes that occur together", f"Heat map over {len(names)} classes", is_wide=True)


def _pictures(card: DataCard, num_samples: int) -> Iterator[_Picture]:
    """Yield samples from shards spread evenly over the data set, the first ones of each: nothing more is read."""
    shards = [(name, shard) for name, split in card.splits.items() for shard in split.shards]
    if not shards or not num_samples:
        return
    chosen = np.unique(np.linspace(0, len(shards) - 1, min(num_samples, len(shards))).astype(int))
    for number, place in enumerate(chosen.tolist()):
        split, shard = shards[place]
        wanted = num_samples // len(chosen) + (number < num_samples % len(chosen))
        for done, stored in enumerate(stored_members(card.directory / shard.file, with_images=True), start=1):
            content = next((stored.parts[kind] for kind in IMAGE_FORMATS if kind in stored.parts), b"")
            if wanted:
                yield _picture(card, split, parse_labels(stored.parts.get(LABELS, b"")), content)
            if done >= wanted:
                break


def _picture(card: DataCard, split: str, labels: Labels, content: bytes) -> _Picture:
    names = [card.class_names[label] for label in labels.positives]
    return _Picture(
        name=labels.sample_id,
        split=split,
        source=image_source(content, labels.sample_id),
        positives=names[:_MOST_LABELS],
        num_more=max(0, len(names) - _MOST_LABELS),
        num_negatives=len(labels.negatives),
    )
