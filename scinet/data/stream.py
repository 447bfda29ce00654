"""Shards to samples in a global order that is a function of (seed, epoch) alone.

A reader (rank, worker) takes the positions p = residue (mod readers) of the pass and opens only the lanes it needs;
with as many lanes as a multiple of the readers each lane is read by one of them, otherwise several readers go through
a lane and each takes its own samples. A pass that begins at a later position opens no shard that it does not need,
skips over samples that have left a lane's window, and decodes nothing before its first sample.
"""

from __future__ import annotations

import logging
import math
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import IterableDataset, get_worker_info

from scinet.data import sources, tars
from scinet.data.card import DataCard
from scinet.data.labels import check_range, parse_labels
from scinet.data.masks import KNOWN_NEGATIVE, KNOWN_POSITIVE
from scinet.data.order import Order, Part, lane_parts, lane_places
from scinet.data.tars import IMAGE_EXTENSIONS, Refused
from scinet.errors import DataError
from scinet.options import DataOptions, OnBadSample
from scinet.texttable import printable

__all__ = ["BadSample", "BadSamples", "Order", "SampleStream", "StoredSample", "check_skipped", "read_evenly"]

_log = logging.getLogger(__name__)
_DEFAULTS = DataOptions()
_FORGIVEN_AMONG = 100


@dataclass(frozen=True)
class StoredSample:
    """A sample as it lies in a shard; its labels stay the places [P] and [N] int32 of known classes."""

    sample_id: str
    index: int
    image: bytes
    positives: npt.NDArray[np.int32]
    negatives: npt.NDArray[np.int32]
    num_classes: int
    where: str

    @property
    def truth(self) -> npt.NDArray[np.int8]:
        """The labels as a new [C] int8."""
        truth = np.zeros(self.num_classes, dtype=np.int8)
        truth[self.positives] = KNOWN_POSITIVE
        truth[self.negatives] = KNOWN_NEGATIVE
        return truth


@dataclass(frozen=True)
class BadSample:
    """Stands at the place of a sample that could not be read, where ``data.on_bad_sample`` is ``skip``."""

    reason: str


_Raw = dict[str, Any] | BadSample


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
        options: DataOptions = _DEFAULTS,
    ) -> None:
        """Describe the pass.

        Args:
            card: of the shards.
            split: train, holdout or test.
            order: seed, epoch, lanes, window.
            rank: this process; it gets the positions p = rank (mod world_size).
            world_size: number of processes.
            transform: applied to each sample in the worker; None yields :class:`StoredSample`. A DataError that it
                raises makes the sample a bad one.
            options: how sources are read and what happens to bad samples.
        """
        super().__init__()
        self._card, self._split, self._order = card, split, order
        self._rank, self._world_size, self._transform, self._options = rank, world_size, transform, options

    def __iter__(self) -> Iterator[Any]:
        """Yield the samples of this rank and worker in the global order, :class:`BadSample` where one is skipped.

        A loader process yields a :class:`DataError` as its last item instead of raising it: raised there, torch would
        wrap it in a traceback.
        """
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        readers = self._world_size * workers
        # the first worker takes this rank's first position, the next its second, as the loader asks them in turn
        first = self._order.start + (self._rank - self._order.start) % self._world_size
        residue = (first + self._world_size * number) % readers
        try:
            for raw in _read_positions(self._card, self._split, self._order, residue, readers, self._options):
                yield self._sample(raw)
        except DataError as error:
            if worker is None:
                raise
            yield error

    def _sample(self, raw: _Raw) -> Any:
        if isinstance(raw, BadSample):
            return raw
        try:
            sample = _parse(raw, self._card)
            return sample if self._transform is None else self._transform(sample)
        except DataError as error:
            if self._options.on_bad_sample is OnBadSample.stop:
                raise
            return BadSample(str(error))


def check_skipped(skipped: int, read: int, largest_fraction: float) -> None:
    """Stop where too many samples are bad; a single one among the first hundred never is.

    Raises:
        DataError: with the arithmetic.
    """
    if skipped > largest_fraction * read and not (skipped == 1 and read <= _FORGIVEN_AMONG):
        raise DataError(
            f"{skipped} of {read} samples could not be read, more than data.max_bad_fraction={largest_fraction:g} "
            "allows: mend the data (the warnings name the samples), or raise it"
        )


class BadSamples:
    """Takes what a stream gave: raises an error, names each bad sample once, and lets only samples through."""

    def __init__(self) -> None:
        """Start with none named."""
        self._named: set[str] = set()

    def checked(self, item: Any) -> Any:
        """Return the item, or None for a bad sample.

        Raises:
            DataError: that a loader process handed over.
        """
        if isinstance(item, DataError):
            raise item
        if not isinstance(item, BadSample):
            return item
        if item.reason not in self._named:
            self._named.add(item.reason)
            _log.warning("skipped: %s", item.reason)
        return None


def read_evenly(
    card: DataCard,
    split: str,
    *,
    rank: int,
    world_size: int,
    transform: Callable[[StoredSample], Any] | None = None,
    options: DataOptions = _DEFAULTS,
) -> Iterator[Any]:
    """Yield a rank's samples of a split in the written order, then None where other ranks have one more.

    Every rank gets equally many, if only None, and makes the same collective calls. Arguments as in
    :class:`SampleStream`.
    """
    rows = -(-card.split(split).num_samples // world_size)
    stream = SampleStream(
        card, split, Order(0, 0, 1, 0), rank=rank, world_size=world_size, transform=transform, options=options
    )
    return islice(chain(stream, repeat(None)), rows)


def _read_positions(
    card: DataCard, split: str, order: Order, residue: int, readers: int, options: DataOptions
) -> Iterator[_Raw]:
    total = card.split(split).num_samples
    length = min(order.length or total, total)
    shared = math.gcd(order.lanes, readers)
    turns, into = divmod(order.start, order.lanes)
    lanes = {
        lane: _lane(card, split, order, lane, turns + (lane < into), options)
        for lane in range(order.lanes)
        if lane % shared == residue % shared
    }
    for first in range(turns * order.lanes, length, order.lanes):
        for lane, samples in lanes.items():
            position = first + lane
            if order.start <= position < length:
                sample = next(samples)
                if position % readers == residue:
                    yield sample


def _lane(card: DataCard, split: str, order: Order, lane: int, skipped: int, options: DataOptions) -> Iterator[_Raw]:
    """Yield the raw samples of one lane, shuffled within the window, without the first ``skipped``."""
    parts = lane_parts([shard.num_samples for shard in card.split(split).shards], order, lane)
    count = sum(part.stop - part.start for part in parts)
    places = lane_places(count, order, lane)
    gone = bytearray(count)
    for place in islice(places, skipped):
        gone[place] = 1
    read = chain.from_iterable(_read_part(card, split, part, gone, options) for part in parts)
    held: dict[int, _Raw] = {}
    for place in places:
        while place not in held:
            number, raw = next(read)
            held[number] = raw
        yield held.pop(place)


def _read_part(
    card: DataCard, split: str, part: Part, gone: bytearray, options: DataOptions
) -> Iterator[tuple[int, _Raw]]:
    """Yield place and raw sample of what a lane still wants from one shard."""
    wanted = [number for number in range(part.start, part.stop) if not gone[part.first + number - part.start]]
    if not wanted:
        return
    shard = card.split(split).shards[part.shard]
    name = sources.shard_name(card, shard)
    found = 0
    try:
        with sources.opened(card, shard, options) as stream:
            limit = options.max_member_mb * 2**20
            for sample in tars.samples(stream, name, wanted, largest_member=limit):
                yield part.first + wanted[found] - part.start, sample
                found += 1
            if found == len(wanted) and part.stop == shard.num_samples:
                stream.finish()
        if found == len(wanted):
            return
        ends = f"ends after {wanted[found]} samples, the data card says {shard.num_samples}"
        failure = f"shard {name} {ends}: it is truncated"
    except DataError as error:
        failure = str(error)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        at = wanted[min(found, len(wanted) - 1)]
        reason = (isinstance(error, OSError) and error.strerror) or error.args[0]
        failure = f"shard {name} is damaged after sample {at} of {shard.num_samples}: {reason}"
    if options.on_bad_sample is OnBadSample.stop:
        raise DataError(failure)
    if found == len(wanted):
        _log.warning("%s", failure)
    for number in wanted[found:]:
        yield part.first + number - part.start, BadSample(f"sample {number} of {failure}")


def _parse(sample: dict[str, Any], card: DataCard) -> StoredSample:
    where = f"shard {sample['__url__']}, sample '{printable(sample['__key__'])}'"
    for extension, content in sample.items():
        if isinstance(content, Refused) and extension in (*IMAGE_EXTENSIONS, "json"):
            raise DataError(f"{where}: its {extension} is not read: {content.reason}")
    image = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
    if image is None or "json" not in sample:
        found = printable(", ".join(sorted(key for key in sample if not key.startswith("__"))))
        raise DataError(f"{where}: holds {found or 'nothing'}, expected json and one of {', '.join(IMAGE_EXTENSIONS)}")
    try:
        labels = parse_labels(sample["json"])
        check_range(labels, card.num_classes, card.num_indices)
    except ValueError as error:
        raise DataError(f"{where}: its labels are not usable: {error}") from error
    positives, negatives = (np.array(places, dtype=np.int32) for places in (labels.positives, labels.negatives))
    return StoredSample(labels.sample_id, labels.index, image, positives, negatives, card.num_classes, where)
