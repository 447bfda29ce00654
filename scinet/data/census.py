"""One pass over the labels of a data set, without its images: label counts and which classes occur together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from scinet.data.card import DataCard
from scinet.data.labels import Labels
from scinet.data.members import split_labels

Counts = npt.NDArray[np.int64]
Progress = Callable[[str, int, int], None]


@dataclass
class Census:
    """What the labels of all splits say.

    ``label_counts`` maps a split to how many of its samples have 0, 1, 2, ... positives; ``shown`` [S] are the classes
    of the co-occurrence, most frequent first; ``together`` [S, S] counts samples that have both, ``judged`` [S, S]
    those that have the row's class and in which the column's is known.
    """

    shown: Counts
    together: Counts
    judged: Counts
    label_counts: dict[str, Counts] = field(default_factory=dict)

    def conditional(self) -> npt.NDArray[np.float64]:
        """Return [S, S]: the share of the row's samples that have the column's class; NaN where it is known in none."""
        return np.where(self.judged > 0, self.together / np.maximum(self.judged, 1), np.nan)


def positives_of(card: DataCard) -> Counts:
    """Return the positives of each class over all splits: [C]."""
    return np.asarray(np.sum([split.num_positives for split in card.splits.values()], axis=0, dtype=np.int64))


def take(card: DataCard, most_classes: int, progress: Progress) -> Census:
    """Read the labels of every split.

    Args:
        card: of the shards.
        most_classes: S at most; the most frequent are taken.
        progress: told of samples done.

    Raises:
        DataError: if a shard is damaged.
    """
    shown = np.argsort(-positives_of(card), kind="stable")[:most_classes]
    empty = np.zeros((len(shown), len(shown)), dtype=np.int64)
    census = Census(shown, empty, empty.copy())
    place = {int(label): number for number, label in enumerate(shown)}
    for name, split in card.splits.items():
        if split.num_samples:
            # each sample is one count in a list that is as long as the richest sample needs
            counts = [0]
            for labels in split_labels(card, name, lambda done, total, name=name: progress(name, done, total)):  # type: ignore[misc]
                number = len(set(labels.positives))
                counts.extend([0] * (number + 1 - len(counts)))
                counts[number] += 1
                _count_pairs(census, labels, place)
            census.label_counts[name] = np.array(counts, dtype=np.int64)
    return census


def _count_pairs(census: Census, labels: Labels, place: dict[int, int]) -> None:
    present = [place[label] for label in labels.positives if label in place]
    known = present + [place[label] for label in labels.negatives if label in place]
    census.together[np.ix_(present, present)] += 1
    census.judged[np.ix_(present, known)] += 1
