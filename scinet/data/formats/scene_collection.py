"""The embedded data set as a collection: labels are drawn while planning, images where the shards are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

from scinet.data.formats import scenes
from scinet.data.records import Collection, ImageSource, Record
from scinet.paths import cache_directory


def collection(options: scenes.SceneOptions, *, test_share: float) -> Collection:
    """Return the scenes; the last ``test_share`` of them are the test split."""
    num_test = round(options.count * test_share)
    # rendered once here, read from the cache by every worker
    drawings = cache_directory() / "drawings"
    _drawings(drawings)

    def records() -> Iterator[Record]:
        for index in range(options.count):
            present = scenes.draw_labels(index, options)
            absent = sorted(set(range(len(scenes.CLASS_NAMES))) - set(present))
            split = "test" if index >= options.count - num_test else "train"
            name = f"scene-{index:07d}"
            yield Record(name, ImageSource(name, offset=index), name, tuple(present), tuple(absent), split)

    return Collection(
        name=f"scenes-{options.difficulty}",
        class_names=list(scenes.CLASS_NAMES),
        source={**scenes.SOURCE, "options": dataclasses.asdict(options) | {"test_share": test_share}},
        records=records,
        num_records=options.count,
        load=partial(_compose, options, drawings),
    )


def _compose(options: scenes.SceneOptions, drawings: Path, source: ImageSource) -> bytes:
    return scenes.compose(source.offset, options, _drawings(drawings))[0]


@lru_cache(maxsize=1)
def _drawings(cache: Path) -> scenes.Drawings:
    return scenes.load_drawings(cache)
