"""How often two classes are present together: exact counts, merged over shards; the card keeps what fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

ALL_PAIRS_UP_TO = 1000
LARGEST_PAIRS = 10_000


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
        self._waiting: list[npt.NDArray[np.int64]] = []
        self._num_waiting = 0

    def add(self, positives: Sequence[int]) -> None:
        """Count the pairs of one image, whose positives come in ascending order."""
        labels = np.asarray(positives, dtype=np.int64)
        first, second = np.triu_indices(len(labels), k=1)
        self._waiting.append(labels[first] * self._num_classes + labels[second])
        self._num_waiting += len(first)
        if self._num_waiting > 2**20:
            self._settle()

    def merge(self, codes: Iterable[int], counts: Iterable[int]) -> None:
        """Add the counts of another counter."""
        self._reduce(np.array(list(codes), dtype=np.int64), np.array(list(counts), dtype=np.int64))

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
        if self._waiting:
            codes, counts = np.unique(np.concatenate(self._waiting), return_counts=True)
            self._waiting, self._num_waiting = [], 0
            self._reduce(codes, counts)

    def _reduce(self, codes: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> None:
        joined, places = np.unique(np.concatenate([self._codes, codes]), return_inverse=True)
        totals = np.zeros(len(joined), dtype=np.int64)
        np.add.at(totals, places, np.concatenate([self._counts, counts]))
        self._codes, self._counts = joined, totals
