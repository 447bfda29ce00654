"""The order of a pass as plain numbers: which sample comes at which position, before anything is read.

An epoch's shards, in a seeded order, are one long sequence, cut into ``lanes`` ranges whose lengths differ by at most
one. Position p of the epoch is the next sample of lane p mod lanes; each lane shuffles within a bounded window. All of
it is a function of (seed, epoch), so that a pass can begin at any position without reading what came before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from scinet.data.masks import derive

_DRAWN_AT_ONCE = 1024


@dataclass(frozen=True)
class Order:
    """The order of one pass over a split, and the part of it that is wanted.

    ``shuffle_window`` 0 keeps the written order. ``length`` cuts the pass off, 0 takes all of it; ``start`` is the
    first position that is read.
    """

    seed: int
    epoch: int
    lanes: int
    shuffle_window: int
    length: int = 0
    start: int = 0


class Part(NamedTuple):
    """The samples [start, stop) of a shard, which a lane reads; ``first`` is the place in the lane of the first."""

    shard: int
    start: int
    stop: int
    first: int


def lane_parts(sizes: Sequence[int], order: Order, lane: int) -> list[Part]:
    """Return what a lane reads, in its order.

    Args:
        sizes: samples of each shard.
        order: of the pass.
        lane: in [0, lanes).
    """
    base, longer = divmod(sum(sizes), order.lanes)
    start = lane * base + min(lane, longer)
    stop = start + base + (lane < longer)
    generator = np.random.Generator(np.random.PCG64(derive(order.seed, "order", order.epoch)))
    sequence = generator.permutation(len(sizes)).tolist() if order.shuffle_window else range(len(sizes))
    parts = []
    for shard, end in zip(sequence, accumulate(sizes[number] for number in sequence), strict=True):
        begin = end - sizes[shard]
        first, last = max(start, begin), min(stop, end)
        if first < last:
            parts.append(Part(shard, first - begin, last - begin, first - start))
    return parts


def lane_places(count: int, order: Order, lane: int) -> Iterator[int]:
    """Yield the places [0, count) of a lane in the order they leave its window.

    A place is taken in, and once more than ``shuffle_window`` are held, one of them drawn at random leaves.
    """
    if not order.shuffle_window:
        yield from range(count)
        return
    generator = np.random.Generator(np.random.PCG64(derive(order.seed, "lane", order.epoch, lane)))
    window = list(range(min(order.shuffle_window, count)))
    full = len(window) + 1
    entering = iter(range(len(window), count))
    for begin in range(len(window), count, _DRAWN_AT_ONCE):
        # numpy draws the same numbers at once as one by one (a test compares)
        for drawn in generator.integers(full, size=min(_DRAWN_AT_ONCE, count - begin)).tolist():
            window.append(next(entering))
            yield _pop(window, drawn)
    while window:
        yield _pop(window, int(generator.integers(len(window))))


def _pop(window: list[int], chosen: int) -> int:
    window[chosen], window[-1] = window[-1], window[chosen]
    return window.pop()
