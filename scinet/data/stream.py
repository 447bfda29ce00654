"""Shards to samples in a global order that is a function of (seed, epoch) alone.

An epoch's shards, in a seeded order, are one long sequence, cut into ``lanes`` ranges whose lengths differ by at most
one. Position p of the epoch is the next sample of lane p mod lanes; each lane shuffles within a bounded window. A
reader (rank, worker) takes the positions p = residue (mod readers) and opens only the lanes it needs; with as many
lanes as a multiple of the readers each tar is read by its own lanes only.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import webdataset
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from scinet.data.card import DataCard
from scinet.data.masks import KNOWN_NEGATIVE, KNOWN_POSITIVE, derive
from scinet.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "png", "webp")


@dataclass(frozen=True)
class StoredSample:
    """A sample as it lies in a shard."""

    sample_id: str
    index: int
    image: bytes
    truth: npt.NDArray[np.int8]
    where: str


@dataclass(frozen=True)
class Order:
    """The order of one pass over a split.

    ``shuffle_window`` 0 keeps the written order. ``length`` cuts the pass off, 0 takes all of it.
    """

    seed: int
    epoch: int
    lanes: int
    shuffle_window: int
    length: int = 0


class SampleStream(IterableDataset[Any]):
    """One pass over a split, the positions of one rank, shared among its loader workers."""

    def __init__(
        self,
        card: DataCard,
        split: str,
        order: Order,
        *,
        rank: int = 0,
        world_size: int = 1,
        transform: Callable[[StoredSample], Any] | None = None,
    ) -> None:
        """Describe the pass.

        Args:
            card: of the shards.
            split: train, holdout or test.
            order: seed, epoch, lanes, window.
            rank: this process; it gets the positions p = rank (mod world_size).
            world_size: number of processes.
            transform: applied to each sample in the worker; None yields :class:`StoredSample`.
        """
        super().__init__()
        self._card, self._split, self._order = card, split, order
        self._rank, self._world_size, self._transform = rank, world_size, transform

    def __iter__(self) -> Iterator[Any]:
        """Yield the samples of this rank and worker in the global order.

        A loader process yields a :class:`DataError` as its last item instead of raising it: raised there, torch would
        wrap it in a traceback.
        """
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        residue, readers = self._rank + self._world_size * number, self._world_size * workers
        try:
            for sample in _read_positions(self._card, self._split, self._order, residue, readers):
                yield sample if self._transform is None else self._transform(sample)
        except DataError as error:
            if worker is None:
                raise
            yield error


def read_evenly(card: DataCard, split: str, *, rank: int, world_size: int) -> Iterator[StoredSample]:
    """Yield a rank's samples of a split in the written order, then a blank where other ranks have one more.

    Every rank gets equally many, if only a blank, and makes the same collective calls.
    """
    rows = -(-card.split(split).num_samples // world_size)
    pixel = io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, "png")
    blank = StoredSample("", -1, pixel.getvalue(), np.zeros(card.num_classes, dtype=np.int8), "a blank")
    stream = SampleStream(card, split, Order(0, 0, 1, 0), rank=rank, world_size=world_size)
    return islice(chain(stream, repeat(blank)), rows)


def _read_positions(card: DataCard, split: str, order: Order, residue: int, readers: int) -> Iterator[StoredSample]:
    total = card.split(split).num_samples
    length = min(order.length or total, total)
    shared = math.gcd(order.lanes, readers)
    lanes = {lane: _lane(card, split, order, lane) for lane in range(order.lanes) if lane % shared == residue % shared}
    for first in range(0, length, order.lanes):
        for lane, samples in lanes.items():
            position = first + lane
            if position < length:
                sample = next(samples)
                if position % readers == residue:
                    yield _parse(sample, card.num_classes)


def _lane(card: DataCard, split: str, order: Order, lane: int) -> Iterator[dict[str, Any]]:
    """Yield the raw samples of one lane, shuffled within the window."""
    shards = card.split(split).shards
    total = sum(shard.num_samples for shard in shards)
    base, longer = divmod(total, order.lanes)
    start = lane * base + min(lane, longer)
    stop = start + base + (lane < longer)
    shuffled = order.shuffle_window > 0
    generator = np.random.Generator(np.random.PCG64(derive(order.seed, "order", order.epoch)))
    sequence = generator.permutation(len(shards)) if shuffled else np.arange(len(shards))
    ends = list(accumulate(shards[number].num_samples for number in sequence))
    raw = (
        sample
        for number, end in zip(sequence, ends, strict=True)
        for sample in _read_range(
            card.directory / shards[number].file,
            shards[number].num_samples,
            start - (end - shards[number].num_samples),
            stop - (end - shards[number].num_samples),
        )
    )
    if not shuffled:
        yield from raw
        return
    generator = np.random.Generator(np.random.PCG64(derive(order.seed, "lane", order.epoch, lane)))
    window: list[dict[str, Any]] = []
    for sample in raw:
        window.append(sample)
        if len(window) > order.shuffle_window:
            yield _pop(window, generator)
    while window:
        yield _pop(window, generator)


def _pop(window: list[dict[str, Any]], generator: np.random.Generator) -> dict[str, Any]:
    chosen = int(generator.integers(len(window)))
    window[chosen], window[-1] = window[-1], window[chosen]
    return window.pop()


def _read_range(path: Path, num_samples: int, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Yield the samples [start, stop) of one tar; bounds outside the tar are cut."""
    start, stop = max(start, 0), min(stop, num_samples)
    if start >= stop:
        return
    found = 0
    try:
        for sample in webdataset.tarfile_samples([{"url": str(path)}]):
            if found >= start:
                yield sample
            found += 1
            if found == stop:
                return
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(f"shard {path} is damaged after sample {found} of {num_samples}: {error.args[0]}") from error
    raise DataError(f"shard {path} ends after {found} samples, the data card says {num_samples}: it is truncated")


def _parse(sample: dict[str, Any], num_classes: int) -> StoredSample:
    where = f"shard {sample['__url__']}, sample '{sample['__key__']}'"
    image = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
    if image is None or "json" not in sample:
        found = ", ".join(sorted(key for key in sample if not key.startswith("__")))
        raise DataError(f"{where}: holds {found or 'nothing'}, expected json and one of {', '.join(IMAGE_EXTENSIONS)}")
    truth = np.zeros(num_classes, dtype=np.int8)
    try:
        labels = json.loads(sample["json"])
        for key, sign in (("positives", KNOWN_POSITIVE), ("negatives", KNOWN_NEGATIVE)):
            places = np.array(labels[key], dtype=np.int64)
            if (places < 0).any():
                raise IndexError(f"class {places.min()}")
            truth[places] = sign
        return StoredSample(str(labels["id"]), int(labels["index"]), image, truth, where)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{where}: its labels are not those of {num_classes} classes: {error}") from error
