"""Scores of a whole split, each sample once at any world size (method.md section 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from scinet.data.batch import Features
from scinet.data.card import DataCard
from scinet.data.stream import BadSamples, StoredSample, check_skipped, read_evenly
from scinet.data.views import SHARD_FORMATS, Views, decode
from scinet.distributed import Ranks, gather_rows
from scinet.guard import Guard
from scinet.model.network import Output
from scinet.options import DataOptions

_BATCH = 64


@dataclass(frozen=True)
class Scores:
    """Probabilities [N, C] and truth [N, C] int8 of a split, in the order it was written, equal on every rank."""

    probabilities: Tensor
    truth: Tensor


@dataclass(frozen=True)
class _Plain:
    """Sample to the whole image and its labels."""

    views: Views

    def __call__(self, sample: StoredSample) -> tuple[Tensor, Tensor]:
        image = decode(sample.image, sample.where, formats=SHARD_FORMATS)
        return self.views.plain(image), torch.from_numpy(sample.truth)


class PlainSplit:
    """A split as the evaluation sees it: the whole image, no augmentation; from shards or from cached features."""

    def __init__(
        self, card: DataCard, name: str, views: Views, features: Features | None, *, options: DataOptions | None = None
    ) -> None:
        """Describe the split; nothing is read yet."""
        self._card, self._name, self._views, self._features = card, name, views, features
        self._options = options or DataOptions()
        self._bad = BadSamples()
        self.num_samples = card.split(name).num_samples

    def score(self, forward: Callable[[Tensor], Output], ranks: Ranks, guard: Guard | None = None) -> Scores:
        """Run a model over the split; skipped samples are left out. Collective.

        Raises:
            DataError: if a sample is bad, or too many were skipped.
            Preempted: between two batches, if the guard was asked to stop.
        """
        guard = guard or Guard()
        columns: tuple[list[Tensor], ...] = ([], [], [])
        for inputs, labels, valid in self._batches(ranks):
            guard.boundary(f"evaluating on '{self._name}'")
            with torch.no_grad():
                columns[0].append(torch.sigmoid(forward(inputs.to(ranks.device)).logits).float())
            columns[1].append(labels.to(ranks.device))
            columns[2].append(valid.to(ranks.device))
        probabilities, truth, is_sample = (gather_rows(torch.cat(rows), ranks).cpu() for rows in columns)
        check_skipped(self.num_samples - int(is_sample.sum()), self.num_samples, self._options.max_bad_fraction)
        return Scores(probabilities[is_sample], truth[is_sample])

    def _batches(self, ranks: Ranks) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield inputs, labels and which rows are samples, in equally many batches of equal size on every rank.

        Under ZeRO 3 a forward pass is a collective, so a rank that has no sample left goes on with empty rows.
        """
        if self._features is not None:
            places = torch.arange(ranks.rank, ranks.rank + self.num_samples, ranks.world_size)
            mine = places.clamp_max(self.num_samples - 1)
            valid = (places < self.num_samples) & (self._features.index[mine] >= 0)
            plain, truth = self._features.plain[mine].float(), self._features.truth[mine]
            yield from zip(*(torch.split(column, _BATCH) for column in (plain, truth, valid)), strict=True)
            return
        side = self._views.image_size
        blank = torch.zeros(3, side, side), torch.zeros(self._card.num_classes, dtype=torch.int8)
        rows = read_evenly(
            self._card,
            self._name,
            rank=ranks.rank,
            world_size=ranks.world_size,
            transform=_Plain(self._views),
            options=self._options,
        )
        samples = map(self._bad.checked, rows)
        while batch := list(islice(samples, _BATCH)):
            images, labels = zip(*(blank if sample is None else sample for sample in batch), strict=True)
            yield torch.stack(images), torch.stack(labels), torch.tensor([sample is not None for sample in batch])
