"""Scores of a whole split, each sample once at any world size (method.md section 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from scinet.data.batch import Features
from scinet.data.card import DataCard
from scinet.data.examples import Mask
from scinet.data.stream import BadSamples, StoredSample, check_skipped, read_evenly
from scinet.data.views import SHARD_FORMATS, Views, decode
from scinet.distributed import Ranks, gather_objects, gather_rows
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
class Computed:
    """What a model computed of a split, its skipped samples left out; equal on every rank, in the order it was written.

    columns [N, ...] each; truth and observed [N, C] int8; index [N] int64; ids, where they were asked for.
    """

    columns: tuple[Tensor, ...]
    truth: Tensor
    observed: Tensor
    index: Tensor
    ids: tuple[str, ...]


class Inputs(NamedTuple):
    """A batch of a rank: inputs [B, ...], truth and observed [B, C] int8, indices and validity [B]."""

    inputs: Tensor
    truth: Tensor
    observed: Tensor
    indices: Tensor
    valid: Tensor
    ids: tuple[str, ...]

    def to(self, device: torch.device) -> Inputs:
        """Return the batch on a device."""
        return Inputs(
            self.inputs.to(device),
            self.truth.to(device),
            self.observed.to(device),
            self.indices.to(device),
            self.valid.to(device),
            self.ids,
        )


@dataclass(frozen=True)
class _Plain:
    """Sample to the whole image, and what is known of it."""

    views: Views

    def __call__(self, sample: StoredSample) -> tuple[Tensor, StoredSample]:
        image = decode(sample.image, sample.where, formats=SHARD_FORMATS)
        return self.views.plain(image), sample


class PlainSplit:
    """A split as the evaluation sees it: the whole image, no augmentation; from shards or from cached features."""

    def __init__(
        self,
        card: DataCard,
        name: str,
        views: Views,
        features: Features | None,
        *,
        options: DataOptions | None = None,
        mask: Mask | None = None,
        bad: BadSamples | None = None,
        stride: int = 1,
    ) -> None:
        """Describe the split; nothing is read yet.

        Args:
            card: of the data.
            name: of the split.
            views: the transforms.
            features: of the split, instead of its images.
            options: of the data.
            mask: which labels are observed; without it all are.
            bad: names the bad samples, each once.
            stride: only every stride-th sample.
        """
        self._card, self._name, self._views, self._features = card, name, views, features
        self._options, self._mask, self._stride = options or DataOptions(), mask, stride
        self._bad = bad or BadSamples()
        self.num_samples = -(-card.split(name).num_samples // stride)

    def score(self, forward: Callable[[Tensor], Output], ranks: Ranks, guard: Guard | None = None) -> Scores:
        """Return the probabilities of a model over the split; skipped samples are left out. Collective.

        Raises:
            DataError: if a sample is bad, or too many were skipped.
            Preempted: between two batches, if the guard was asked to stop.
        """
        computed = self.compute(lambda batch: (torch.sigmoid(forward(batch.inputs).logits).float(),), ranks, guard)
        return Scores(computed.columns[0], computed.truth)

    def compute(
        self,
        answer: Callable[[Inputs], tuple[Tensor, ...]],
        ranks: Ranks,
        guard: Guard | None = None,
        *,
        with_ids: bool = False,
    ) -> Computed:
        """Return what a model makes of every batch, [B, ...] each, over the whole split. Collective.

        Raises:
            DataError: if a sample is bad, or too many were skipped.
            Preempted: between two batches, if the guard was asked to stop.
        """
        guard = guard or Guard()
        parts: list[tuple[Tensor, ...]] = []
        ids: list[str] = []
        for batch in self._batches(ranks):
            guard.boundary(f"evaluating on '{self._name}'")
            there = batch.to(ranks.device)
            with torch.no_grad():
                parts.append((*answer(there), there.truth, there.observed, there.indices, there.valid))
            ids.extend(batch.ids)
        *columns, is_sample = (gather_rows(torch.cat(rows), ranks).cpu() for rows in zip(*parts, strict=True))
        check_skipped(self.num_samples - int(is_sample.sum()), self.num_samples, self._options.max_bad_fraction)
        *answers, truth, observed, index = (column[is_sample] for column in columns)
        named = gather_objects(ids, ranks) if with_ids else []
        kept = tuple(name for name, is_there in zip(named, is_sample.tolist(), strict=False) if is_there)
        return Computed(tuple(answers), truth, observed, index, kept)

    def _observed(self, truth: Tensor, ids: Sequence[str]) -> Tensor:
        if self._mask is None:
            return truth
        mask = self._mask
        rows = [
            torch.from_numpy(mask.of_any_split(row.numpy(), name)) if name else row
            for row, name in zip(truth, ids, strict=True)
        ]
        return torch.stack(rows) if rows else truth

    def _batches(self, ranks: Ranks) -> Iterator[Inputs]:
        """Yield equally many batches of equal size on every rank.

        Under ZeRO 3 a forward pass is a collective, so a rank that has no sample left goes on with empty rows.
        """
        if self._features is not None:
            yield from self._from_features(self._features, ranks)
            return
        side = self._views.image_size
        rows = read_evenly(
            self._card,
            self._name,
            rank=ranks.rank * self._stride,
            world_size=ranks.world_size * self._stride,
            transform=_Plain(self._views),
            options=self._options,
        )
        samples = map(self._bad.checked, rows)
        while batch := list(islice(samples, _BATCH)):
            blank = torch.zeros(self._card.num_classes, dtype=torch.int8)
            ids = tuple("" if row is None else row[1].sample_id for row in batch)
            truth = torch.stack([blank if row is None else torch.from_numpy(row[1].truth) for row in batch])
            yield Inputs(
                torch.stack([torch.zeros(3, side, side) if row is None else row[0] for row in batch]),
                truth,
                self._observed(truth, ids),
                torch.tensor([-1 if row is None else row[1].index for row in batch]),
                torch.tensor([row is not None for row in batch]),
                ids,
            )

    def _from_features(self, features: Features, ranks: Ranks) -> Iterator[Inputs]:
        places = torch.arange(ranks.rank, ranks.rank + self.num_samples, ranks.world_size)
        mine = places.clamp_max(self.num_samples - 1) * self._stride
        valid = (places < self.num_samples) & (features.index[mine] >= 0)
        for rows, are_samples in zip(torch.split(mine, _BATCH), torch.split(valid, _BATCH), strict=True):
            ids = tuple(features.ids[row] for row in rows.tolist()) if features.ids else ()
            truth = features.truth[rows]
            observed = self._observed(truth, ids)
            yield Inputs(features.plain[rows].float(), truth, observed, features.index[rows], are_samples, ids)
