"""What can be wrong with a data set, and what was found: the vocabulary of ``scinet data validate``."""

from __future__ import annotations

from dataclasses import dataclass, field

from scinet.data.card import SPLITS

NUM_EXAMPLES = 3
"""Names shown of each finding."""

ERROR, WARNING = "error", "warning"
KINDS = {
    "shard-name": (ERROR, "shard that is no plain file name beside the card, or is listed twice"),
    "shard-missing": (ERROR, "shard that is missing or cannot be read"),
    "shard-size": (ERROR, "shard whose size is not the card's"),
    "shard-checksum": (ERROR, "shard whose SHA-256 is not the card's"),
    "shard-damaged": (ERROR, "shard that is no readable tar to its end"),
    "shard-samples": (ERROR, "shard whose number of samples is not the card's"),
    "member-foreign": (ERROR, "member that is no plain file of a sample (jpg, png, webp, json)"),
    "member-twice": (ERROR, "member whose name comes twice"),
    "sample-incomplete": (ERROR, "sample without json, or without exactly one image"),
    "labels-malformed": (ERROR, "sample whose json is not id, index, positives, negatives"),
    "labels-large": (ERROR, "sample whose json is larger than any that training reads"),
    "class-range": (ERROR, "sample with a class that the card does not have"),
    "class-both": (ERROR, "sample with a class both positive and negative"),
    "class-repeated": (ERROR, "sample that lists a class more than once"),
    "id-repeated": (ERROR, "id of more than one sample"),
    "index-repeated": (ERROR, "index of more than one sample"),
    "index-range": (ERROR, "sample whose index is not below the number of samples"),
    "image-broken": (ERROR, "image that cannot be decoded"),
    "image-leak": (ERROR, "image in the test split and in another"),
    "card-counts": (ERROR, "count of the card that is not what the shards hold"),
    "card-classes": (ERROR, "class name that comes twice"),
    "image-in-two-splits": (WARNING, "image in both train and holdout"),
    "image-repeated": (WARNING, "image more than once in a split"),
    "image-extension": (WARNING, "image in another format than its extension says"),
    "row-empty": (WARNING, "sample without a known label"),
    "row-without-positive": (WARNING, "sample with known negatives only"),
    "class-unseen": (WARNING, "class without a positive in train"),
    "split-name": (WARNING, f"split that is none of {', '.join(SPLITS)}"),
    "shard-unlisted": (WARNING, "tar beside the card that it does not list"),
}
"""What can be found: its level, and the words for it."""


@dataclass
class Findings:
    """How often each kind was found, and the first names of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, *names: str, count: int = 1) -> None:
        """Count a finding; only the first names are kept."""
        self.counts[kind] = self.counts.get(kind, 0) + count
        known = self.examples.setdefault(kind, [])
        known.extend(names[: NUM_EXAMPLES - len(known)])

    def merge(self, other: Findings) -> None:
        """Take what another look has found."""
        for kind, count in other.counts.items():
            self.add(kind, *other.examples[kind], count=count)

    def total(self, level: str) -> int:
        """Return how many findings of a level there are."""
        return sum(count for kind, count in self.counts.items() if KINDS[kind][0] == level)
