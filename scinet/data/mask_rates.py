"""What a mask leaves of a split's labels: known rates by class with their intervals, and whether it fits the card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from scinet.data.card import DataCard
from scinet.data.findings import NUM_EXAMPLES
from scinet.data.labels import Labels
from scinet.data.mask_file import MaskTable, Row
from scinet.data.masks import KNOWN_NEGATIVE, KNOWN_POSITIVE, UNKNOWN
from scinet.data.members import split_labels

CONFIDENCE_LEVEL = 0.95
_NORMAL_QUANTILE = 1.959963984540054  # two-sided, of that level
_WORDS = {KNOWN_POSITIVE: "positive", KNOWN_NEGATIVE: "negative", UNKNOWN: "unknown"}

Observe = Callable[[npt.NDArray[np.int8], str], npt.NDArray[np.int8] | None]
Progress = Callable[[int, int], None]
Counts = npt.NDArray[np.int64]
Rates = npt.NDArray[np.float64]


class MaskSurvey:
    """Counts what a mask shows of a split.

    ``total`` and ``known`` [2, C] count the cells of the collection and those that the mask leaves, positives first;
    ``flipped`` [2, C] those of them that it leaves with the other sign, which a mask that is read should not have.
    The lists hold the first names only; ``num_...`` count them all.
    """

    def __init__(self, card: DataCard) -> None:
        """Start with nothing counted."""
        self._card = card
        self.total, self.known, self.flipped = (np.zeros((2, card.num_classes), dtype=np.int64) for _ in range(3))
        self.num_samples = self.num_missing = self.num_contradictions = self.num_added = 0
        self.missing: list[str] = []
        self.contradictions: list[str] = []
        self.added: list[str] = []

    def rows(self, split: str, mask: Observe, progress: Progress) -> Iterator[Row]:
        """Yield each sample's known cells, those of missing samples left out, and count on the way.

        Args:
            split: whose samples are masked.
            mask: gives observed [C] from truth [C] and id, or None for a sample it does not have.
            progress: told of samples done and in all.

        Raises:
            DataError: if a shard is damaged.
        """
        for labels in split_labels(self._card, split, progress):
            truth = _dense(labels, self._card.num_classes)
            observed = mask(truth, labels.sample_id)
            self.num_samples += 1
            self.total += _signs(truth)
            if observed is None:
                self.num_missing += 1
                _keep(self.missing, f"'{labels.sample_id}'")
                continue
            self.known += _signs(truth) & (observed != UNKNOWN)
            self.flipped += _signs(truth) & _signs(-observed)
            self._compare(truth, observed, labels.sample_id)
            positives, negatives = (tuple(np.flatnonzero(row).tolist()) for row in _signs(observed))
            yield Row(labels.sample_id, positives, negatives)

    def _compare(self, truth: npt.NDArray[np.int8], observed: npt.NDArray[np.int8], sample_id: str) -> None:
        wrong = np.flatnonzero(truth * observed < 0)
        added = np.flatnonzero((truth == 0) & (observed != 0))
        self.num_contradictions += len(wrong)
        self.num_added += len(added)
        for kept, cells in ((self.contradictions, wrong), (self.added, added)):
            for c in cells[:NUM_EXAMPLES].tolist():
                said, true = _WORDS[int(observed[c])], _WORDS[int(truth[c])]
                name = self._card.class_names[c]
                _keep(kept, f"'{sample_id}' '{name}': {said} in the mask, {true} in the shards")


def from_table(table: MaskTable) -> Observe:
    """Return the mask of a file; None for a sample that it does not have."""

    def mask(_: npt.NDArray[np.int8], sample_id: str) -> npt.NDArray[np.int8] | None:
        return None if table.find(sample_id) is None else table.observe(sample_id)

    return mask


def _dense(labels: Labels, num_classes: int) -> npt.NDArray[np.int8]:
    truth = np.zeros(num_classes, dtype=np.int8)
    truth[list(labels.positives)] = KNOWN_POSITIVE
    truth[list(labels.negatives)] = KNOWN_NEGATIVE
    return truth


def _signs(labels: npt.NDArray[np.int8]) -> npt.NDArray[np.bool_]:
    """Return [2, C]: which cells are positive, and which negative."""
    return np.stack([labels == KNOWN_POSITIVE, labels == KNOWN_NEGATIVE])


def _keep(names: list[str], name: str) -> None:
    if len(names) < NUM_EXAMPLES:
        names.append(name)


def wilson(known: Counts, total: Counts) -> tuple[Rates, Rates]:
    """Return the 95 % interval of a share: low and high, 0 and 1 where nothing was counted.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    """
    n = np.maximum(total, 1).astype(np.float64)
    share, z = known / n, _NORMAL_QUANTILE
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)
    return np.where(total > 0, low, 0.0), np.where(total > 0, high, 1.0)


@dataclass(frozen=True)
class Strangers:
    """Ids of a mask that are not in the split: how many lie in other splits, how many in none, the first of those."""

    num_in_other_splits: int
    num_unknown: int
    unknown: list[str]


def strangers(card: DataCard, split: str, table: MaskTable, rows: Iterator[Row]) -> Strangers:
    """Compare the ids of a mask with those of all splits.

    Args:
        card: of the shards.
        split: whose ids are no strangers.
        table: the mask.
        rows: the same mask, to be read once more for the names.

    Raises:
        DataError: if a shard is damaged.
    """
    where = np.full(len(table), -1, dtype=np.int8)
    for place, name in enumerate(card.splits):
        if card.splits[name].num_samples:
            for labels in split_labels(card, name, lambda *_: None):
                row = table.find(labels.sample_id)
                if row is not None:
                    where[row] = place
    elsewhere = (where >= 0) & (where != list(card.splits).index(split))
    unknown = where < 0
    names = (f"'{row.sample_id}'" for number, row in enumerate(rows) if unknown[number])
    return Strangers(int(elsewhere.sum()), int(unknown.sum()), list(islice(names, NUM_EXAMPLES)))
