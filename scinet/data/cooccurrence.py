"""How often two classes are present together: exact counts, merged over shards; the card keeps what fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

ALL_PAIRS_UP_TO = 1000
LARGEST_PAIRS = 10_000
_MAX_WAITING = 2**20


@dataclass(frozen=True)
class Cooccurrence:
    """Images that show both classes of a pair, for every pair ``first < second`` seen at least once.

    ``num_pairs`` is how many such pairs there are; fewer than that are listed where the card keeps the most frequent
    only.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    num_images: tuple[int, ...]
    num_pairs: int

    @property
    def is_whole(self) -> bool:
        """Whether every pair is listed."""
        return self.num_pairs == len(self.first)

    def tree(self) -> dict[str, Any]:
        """Return it as the card writes it."""
        kept = "every pair" if self.is_whole else f"the {len(self.first)} most frequent pairs"
        return {
            "kept": kept,
            "num_pairs": self.num_pairs,
            "first": list(self.first),
            "second": list(self.second),
            "num_images": list(self.num_images),
        }


def from_tree(tree: dict[str, Any]) -> Cooccurrence:
    """Return what :meth:`Cooccurrence.tree` wrote."""
    first, second, num_images = (tuple(map(int, tree[key])) for key in ("first", "second", "num_images"))
    return Cooccurrence(first, second, num_images, int(tree["num_pairs"]))


class PairCounter:
    """Counts pairs as codes ``first * C + second``, in memory proportional to the pairs that occur."""

    def __init__(self, num_classes: int) -> None:
        """Start at nothing."""
        self._num_classes = num_classes
        self._codes = np.zeros(0, dtype=np.int64)
        self._counts = np.zeros(0, dtype=np.int64)
        self._waiting: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
        self._num_waiting = 0

    def add(self, positives: Sequence[int]) -> None:
        """Count the pairs of one image, whose positives come in ascending order."""
        labels = np.asarray(positives, dtype=np.int64)
        first, second = _pair_places(len(labels))
        self._wait(labels[first] * self._num_classes + labels[second], np.ones(len(first), dtype=np.int64))

    def merge(self, codes: Sequence[int], counts: Sequence[int]) -> None:
        """Add the counts of another counter."""
        self._wait(np.asarray(codes, dtype=np.int64), np.asarray(counts, dtype=np.int64))

    def _wait(self, codes: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> None:
        self._waiting.append((codes, counts))
        self._num_waiting += len(codes)
        if self._num_waiting > _MAX_WAITING:
            self._settle()

    def pairs(self) -> tuple[list[int], list[int]]:
        """Return codes in ascending order and their counts."""
        self._settle()
        return self._codes.tolist(), self._counts.tolist()

    def result(self) -> Cooccurrence:
        """Return the counts for the card: all of them up to 1,000 classes, else the 10,000 largest."""
        self._settle()
        kept = np.arange(len(self._codes))
        if self._num_classes > ALL_PAIRS_UP_TO and len(kept) > LARGEST_PAIRS:
            kept = np.sort(np.lexsort((self._codes, -self._counts))[:LARGEST_PAIRS])
        first, second = np.divmod(self._codes[kept], max(self._num_classes, 1))
        columns = [tuple(column.tolist()) for column in (first, second, self._counts[kept])]
        return Cooccurrence(columns[0], columns[1], columns[2], len(self._codes))

    def _settle(self) -> None:
        """Sum what waits into the counts."""
        codes, counts = zip((self._codes, self._counts), *self._waiting, strict=True)
        self._codes, places = np.unique(np.concatenate(codes), return_inverse=True)
        self._counts = np.zeros(len(self._codes), dtype=np.int64)
        np.add.at(self._counts, places, np.concatenate(counts))
        self._waiting, self._num_waiting = [], 0


@lru_cache(maxsize=64)
def _pair_places(length: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    return np.triu_indices(length, k=1)
