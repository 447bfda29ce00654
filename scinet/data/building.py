"""Sources to shards: one function a kind of source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from scinet.data import shards
from scinet.data.card import DataCard
from scinet.data.formats import scenes, table
from scinet.data.shards import RawSample
from scinet.paths import cache_directory

Progress = Callable[[str, int, int], None]


def build_scenes(
    options: scenes.SceneOptions,
    out: Path,
    *,
    test_share: float,
    holdout: float,
    shard_samples: int,
    progress: Progress,
) -> DataCard:
    """Compose scenes and write them; the last ``test_share`` of them are the test split."""
    num_test = round(options.count * test_share)

    def samples() -> Iterator[RawSample]:
        drawings = scenes.load_drawings(cache_directory() / "drawings")
        for index in range(options.count):
            image, positives = scenes.compose(index, options, drawings)
            present = set(positives)
            negatives = tuple(label for label in range(len(scenes.CLASS_NAMES)) if label not in present)
            split = "test" if index >= options.count - num_test else "train"
            yield RawSample(f"scene-{index:07d}", image, "jpg", tuple(positives), negatives, split)
            progress("scenes", index + 1, options.count)

    return shards.build(
        samples(),
        out,
        name=f"scenes-{options.difficulty}",
        class_names=list(scenes.CLASS_NAMES),
        source={**scenes.SOURCE, "options": dataclasses.asdict(options)},
        holdout=holdout,
        shard_samples=shard_samples,
    )


def build_table(
    options: table.TableOptions, out: Path, *, name: str, holdout: float, shard_samples: int, progress: Progress
) -> DataCard:
    """Read a label table and its images and write them."""
    class_names, rows = table.read(options)

    def samples() -> Iterator[RawSample]:
        for done, sample in enumerate(table.samples(options, rows), start=1):
            yield sample
            progress("images", done, len(rows))

    described = {key: str(value) for key, value in dataclasses.asdict(options).items() if value is not None}
    return shards.build(
        samples(),
        out,
        name=name,
        class_names=class_names,
        source={"name": options.labels.name, "rows": len(rows), "options": described},
        holdout=holdout,
        shard_samples=shard_samples,
    )
