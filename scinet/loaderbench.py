"""`scinet bench loader`: samples a second of our reading path against what a user would write, and against its limit.

All contestants decode the same images and draw the same views with the same functions, in one process (or as many
loader processes as asked), and take turns; each figure is that of the fastest turn. The limit is the bare loop over
images in memory: decode, draw, nothing else. Beside it, how long a resumed epoch takes to get past many samples.
"""

from __future__ import annotations

import dataclasses
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scinet.data.batch import ImageBatches
from scinet.data.card import DataCard, Shard, Split
from scinet.data.examples import Mask
from scinet.data.share import Share
from scinet.data.stream import Order, SampleStream, StoredSample
from scinet.data.views import VIEW_NAMES, Normalisation, Views, decode
from scinet.errors import ConfigError
from scinet.options import DataOptions
from scinet_kernels.bench import environment

OURS, WEBDATASET, FILES, LIMIT = "scinet", "webdataset", "Dataset over files", "bare loop in memory"
TARGETS = {LIMIT: 0.9, WEBDATASET: 1.0, FILES: 1.0}
"""What our rate over a contestant's should reach."""

SKIPPED, SKIP_TARGET = 100_000, 50.0
"""Samples that a resumed epoch leaves behind, and how much faster than reading them that should be."""

# Median over minimum of the limit's turns beyond which a run cannot be trusted.
_STEADY = 1.3
_NORMALISATION = Normalisation((0.481, 0.458, 0.408), (0.269, 0.261, 0.276))


@dataclass(frozen=True)
class Setting:
    """What is read: images in all, of a global batch, loader processes, side of a view, turns."""

    images: int
    batch: int
    workers: int
    image_size: int
    repeats: int


@dataclass(frozen=True)
class Row:
    """One contestant: samples/s per core, and our rate over its."""

    contestant: str
    samples_per_s: float
    ours_over_it: float
    target: float | None
    is_steady: bool


@dataclass(frozen=True)
class Resume:
    """Seconds to the first batch of an epoch that is resumed after ``skipped`` samples, beyond those of a new epoch.

    ``reading_s`` is what reading those samples takes, at the rate that was measured.
    """

    skipped: int
    skipping_s: float
    reading_s: float

    @property
    def times_faster(self) -> float:
        """Reading over skipping."""
        return self.reading_s / self.skipping_s


@dataclass(frozen=True)
class _Material:
    """The same samples three ways: in shards, as files, in memory."""

    card: DataCard
    folder: Path
    stored: list[StoredSample]
    views: Views
    options: DataOptions


def measure(card: DataCard, setting: Setting, say: Callable[[str], None]) -> tuple[list[Row], Resume]:
    """Let the contestants take turns over the first shards of a training split, then skip over many of them.

    Args:
        card: of the data set.
        setting: what is read.
        say: told what is being measured.

    Raises:
        ConfigError: if the split has fewer images than a batch.
    """
    with tempfile.TemporaryDirectory(prefix="scinet-bench-") as folder:
        material = _prepare(card, Path(folder), setting)
        # as in a run, which makes it once and not once an epoch
        source = _source(material, material.card, setting)
        contestants: dict[str, Callable[[], int]] = {
            LIMIT: lambda: _bare_loop(material),
            OURS: lambda: _ours(source),
            WEBDATASET: lambda: _plain_webdataset(material, setting),
            FILES: lambda: _files(material, setting),
        }
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for run in contestants.values():
            run()  # warm page cache and allocator
        for turn in range(setting.repeats):
            say(f"turn {turn + 1} of {setting.repeats}, {len(material.stored)} images")
            for name, run in contestants.items():
                started = time.perf_counter()
                done = run()
                rates[name].append(done / (time.perf_counter() - started))
        say(f"skip {SKIPPED} samples")
        resume = _resume(material, setting, SKIPPED / max(rates[OURS]))
    cores = {name: 1 if name == LIMIT else max(1, setting.workers) for name in rates}
    best = {name: max(found) / cores[name] for name, found in rates.items()}
    is_steady = max(rates[LIMIT]) <= _STEADY * statistics.median(rates[LIMIT])
    rows = [
        Row(name, rate, best[OURS] / rate, TARGETS.get(name), is_steady)
        for name, rate in sorted(best.items(), key=lambda pair: -pair[1])
    ]
    return rows, resume


def _prepare(card: DataCard, folder: Path, setting: Setting) -> _Material:
    split = card.split("train")
    shards: list[Shard] = []
    for shard in split.shards:
        if sum(taken.num_samples for taken in shards) < setting.images:
            shards.append(shard)
    num_samples = sum(shard.num_samples for shard in shards)
    if num_samples < setting.batch:
        raise ConfigError(f"--batch {setting.batch} is more than the {num_samples} training images of {card.directory}")
    part = Split(num_samples, split.num_positives, split.num_negatives, tuple(shards))
    card = dataclasses.replace(card, splits={"train": part})
    stored = list(SampleStream(card, "train", Order(0, 0, 1, 0)))
    for number, sample in enumerate(stored):
        (folder / f"{number:07d}.jpg").write_bytes(sample.image)
    options = DataOptions(workers=setting.workers)
    views = Views(setting.image_size, _NORMALISATION, smallest_crop=options.smallest_crop)
    return _Material(card, folder, stored, views, options)


def _source(material: _Material, card: DataCard, setting: Setting) -> ImageBatches:
    return ImageBatches(card, material.options, material.views, VIEW_NAMES, Share(0, 1, setting.batch, 1), seed=0)


def _ours(source: ImageBatches) -> int:
    return sum(len(batch.ids) for batch in source.epoch(0))


def _resume(material: _Material, setting: Setting, reading_s: float) -> Resume:
    """Begin an epoch of enough samples at its start and after those that are skipped, in turns."""
    source = _source(material, _repeated(material, SKIPPED + SKIPPED // 10), setting)
    step = SKIPPED // setting.batch
    taken: dict[int, list[float]] = {0: [], step: []}
    for _ in range(setting.repeats):
        for start, seconds in taken.items():
            started = time.perf_counter()
            next(source.epoch(0, start))
            seconds.append(time.perf_counter() - started)
    skipping_s = max(min(taken[step]) - min(taken[0]), 1e-3)
    return Resume(step * setting.batch, skipping_s, reading_s)


def _repeated(material: _Material, num_samples: int) -> DataCard:
    """Return a card of the same shards over and over, each under many names, until there are enough samples."""
    split = material.card.split("train")
    shards: list[Shard] = []
    for round_ in range(-(-num_samples // split.num_samples)):
        for shard in split.shards:
            name = f"round-{round_:06d}-{shard.file}"
            (material.folder / name).symlink_to((material.card.directory / shard.file).resolve())
            shards.append(dataclasses.replace(shard, file=name))
    total = sum(shard.num_samples for shard in shards)
    train = dataclasses.replace(split, num_samples=total, shards=tuple(shards))
    return dataclasses.replace(material.card, directory=material.folder, splits={"train": train})


def _three_views(views: Views, content: bytes, sample_id: str) -> Tensor:
    image = decode(content, "the bench")
    return torch.stack([views.random(image, name, seed=0, epoch=0, sample_id=sample_id) for name in VIEW_NAMES])


def _bare_loop(material: _Material) -> int:
    for sample in material.stored:
        image = decode(sample.image, "the bench")
        for name in VIEW_NAMES:
            material.views.random(image, name, seed=0, epoch=0, sample_id=sample.sample_id)
    return len(material.stored)


@dataclass(frozen=True)
class _FromShard:
    """What a webdataset user maps over raw samples: views and both label vectors."""

    views: Views
    mask: Mask
    num_classes: int

    def __call__(self, sample: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        labels = json.loads(sample["json"])
        truth = torch.zeros(self.num_classes, dtype=torch.int8)
        truth[labels["positives"]], truth[labels["negatives"]] = 1, -1
        content = next(sample[extension] for extension in ("jpg", "png", "webp") if extension in sample)
        observed = torch.from_numpy(self.mask(truth.numpy(), labels["id"]))
        return _three_views(self.views, content, labels["id"]), observed, truth


def _plain_webdataset(material: _Material, setting: Setting) -> int:
    paths = [str(path) for path in material.card.shard_paths("train")]
    mapped = _FromShard(
        material.views, Mask(material.options, material.card.training_positives), material.card.num_classes
    )
    pipeline = webdataset.WebDataset(paths, shardshuffle=False, empty_check=False).shuffle(512).map(mapped)
    # the batches of a worker that has few shards are short, and counted as they are
    batches = DataLoader(pipeline.batched(setting.batch), batch_size=None, num_workers=setting.workers)
    return sum(len(observed) for _, observed, _ in batches)


class _FileDataset(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """What a torch user writes: one file an image, the labels in memory."""

    def __init__(self, material: _Material) -> None:
        self._folder, self._views, self._mask = (
            material.folder,
            material.views,
            Mask(material.options, material.card.training_positives),
        )
        self._labels = [(sample.sample_id, sample.truth) for sample in material.stored]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        sample_id, truth = self._labels[number]
        content = (self._folder / f"{number:07d}.jpg").read_bytes()
        observed = torch.from_numpy(self._mask(truth, sample_id))
        return _three_views(self._views, content, sample_id), observed, torch.from_numpy(truth)


def _files(material: _Material, setting: Setting) -> int:
    batches = DataLoader(
        _FileDataset(material), batch_size=setting.batch, shuffle=True, drop_last=True, num_workers=setting.workers
    )
    return sum(len(observed) for _, observed, _ in batches)


def report(rows: Sequence[Row], resume: Resume, setting: Setting) -> str:
    """Return the rows as a Markdown table, and what skipping takes."""
    text = io.StringIO()
    print(
        f"Three views of {setting.image_size} pixels, batches of {setting.batch}, {setting.workers} loader processes, "
        f"{torch.get_num_threads()} thread(s); samples/s are per core.\n",
        file=text,
    )
    for line in _lines(rows):
        print(f"| {' | '.join(line)} |", file=text)
    verdict = "met" if resume.times_faster >= SKIP_TARGET else "missed"
    print(
        f"\nResuming after {resume.skipped:,} samples: {resume.skipping_s:.2f} s; reading them: "
        f"{resume.reading_s:.0f} s, {resume.times_faster:,.0f} times as long (target {SKIP_TARGET:g}, {verdict}).",
        file=text,
    )
    if not rows[0].is_steady:
        print("\nThe turns of the limit lie far apart: the machine is busy, measure again.", file=text)
    return text.getvalue()


def _lines(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    yield "contestant", "samples/s", "ms a sample", "scinet / it", "target"
    yield ("---",) * 5
    for row in rows:
        verdict = (
            "" if row.target is None else f"{row.target:g} {'met' if row.ours_over_it >= row.target else 'missed'}"
        )
        yield (
            row.contestant,
            f"{row.samples_per_s:.1f}",
            f"{1e3 / row.samples_per_s:.2f}",
            f"{row.ours_over_it:.3f}",
            verdict,
        )


def to_json(rows: Sequence[Row], resume: Resume, setting: Setting) -> str:
    """Return rows, resume, setting and environment as JSON."""
    whole = {"environment": environment(), "setting": dataclasses.asdict(setting)}
    whole["resume"] = dataclasses.asdict(resume)
    return json.dumps(whole | {"rows": [dataclasses.asdict(row) for row in rows]}, indent=1) + "\n"
