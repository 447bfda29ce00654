"""The data card of a build: the reports of its shards, summed one after the other."""

from __future__ import annotations

import json
import shutil
from collections import Counter

from scinet.data import card
from scinet.data.cooccurrence import PairCounter
from scinet.data.plan import MISSING_NAME, Plan, missing_line
from scinet.data.records import Collection
from scinet.data.shards import ShardReport, read_report
from scinet.data.workshop import Workshop
from scinet.errors import DataError


class _SplitTotals:
    """The counts of one split."""

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._positives: Counter[int] = Counter()
        self._negatives: Counter[int] = Counter()
        self._pairs = PairCounter(num_classes)
        self._shards: list[card.Shard] = []

    def add(self, report: ShardReport) -> None:
        self._positives.update(report.positives)
        self._negatives.update(report.negatives)
        self._pairs.merge(report.pair_codes, report.pair_counts)
        if report.num_samples:
            self._shards.append(card.Shard(report.file, report.num_samples, report.num_bytes, report.sha256))

    def split(self) -> card.Split:
        return card.Split(
            num_samples=sum(shard.num_samples for shard in self._shards),
            num_positives=tuple(self._positives[label] for label in range(self._num_classes)),
            num_negatives=tuple(self._negatives[label] for label in range(self._num_classes)),
            shards=tuple(self._shards),
            cooccurrence=self._pairs.result(),
        )


def write_card(plan: Plan, collection: Collection, workshop: Workshop) -> None:
    """Write the card, and beside it the list of what is missing; shards in which no image was left are removed.

    Raises:
        DataError: if no image was left in any.
    """
    totals = {shard.split: _SplitTotals(len(collection.class_names)) for shard in plan.shards}
    listed, num_broken = workshop.whole / MISSING_NAME, 0
    shutil.copyfile(plan.folder / MISSING_NAME, listed)
    with listed.open("a", encoding="utf-8") as file:
        for shard in plan.shards:
            report = read_report(workshop.sidecar(shard.file))
            assert report is not None
            totals[shard.split].add(report)
            file.writelines(missing_line(*entry) for entry in report.broken)
            num_broken += len(report.broken)
            if not report.num_samples:
                (workshop.whole / shard.file).unlink()
    is_whole = not plan.num_missing and not num_broken
    if is_whole:
        listed.unlink()
    splits = {name: total.split() for name, total in totals.items()}
    if not any(split.num_samples for split in splits.values()):
        raise DataError("not one image could be decoded: nothing was written")
    card.write(
        workshop.whole,
        name=collection.name or workshop.out.name,
        class_names=collection.class_names,
        splits=splits,
        source=json.loads(json.dumps(collection.source)),
        num_indices=plan.num_indices,
        missing=card.Missing(plan.num_missing, num_broken, "" if is_whole else MISSING_NAME),
    )
