"""What a training step receives, and where it comes from: shards decoded on the fly, or cached features."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from scinet.data.buffers import Buffers
from scinet.data.card import DataCard
from scinet.data.examples import Cells, Decoder, Example, Mask
from scinet.data.loading import loaded
from scinet.data.masks import derive
from scinet.data.share import Share
from scinet.data.stream import BadSamples, Order, SampleStream
from scinet.data.views import VIEW_NAMES, Views
from scinet.options import DataOptions, OnBadSample

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank.

    inputs [V * B, 3, H, W] images, or [V * B, F] features, view by view; observed [B, C] int8, what the mask leaves;
    truth [B, C] int8, what the collection knows, for logs and `full_labels` alone; index [B] int64; ids, the stored
    sample ids; valid [B] bool. A row that is not valid has no sample: zeros, nothing observed, index -1, id "".
    """

    inputs: Tensor
    observed: Tensor
    truth: Tensor
    index: Tensor
    ids: tuple[str, ...]
    valid: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(
            inputs=self.inputs.to(device, non_blocking=True),
            observed=self.observed.to(device, non_blocking=True),
            truth=self.truth.to(device, non_blocking=True),
            index=self.index.to(device, non_blocking=True),
            ids=self.ids,
            valid=self.valid.to(device, non_blocking=True),
        )


class BatchSource(Protocol):
    """Micro-batches of the training split in global order."""

    num_samples: int
    steps_per_epoch: int
    has_gaps: bool  # whether a row of a batch may be without a sample

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's micro-batches of an epoch, from a step of it on.

        From step 0 there are ``steps_per_epoch`` times the accumulation steps, on every rank.
        """
        ...


class ImageBatches:
    """Batches from the shards, decoded and augmented on the fly."""

    def __init__(
        self,
        card: DataCard,
        options: DataOptions,
        views: Views,
        view_names: Sequence[str],
        share: Share,
        seed: int,
        *,
        bad: BadSamples | None = None,
    ) -> None:
        """Check that the batches divide; nothing is read yet. ``bad`` names the bad samples, each once."""
        self._card, self._options, self._views, self._share, self._seed = card, options, views, share, seed
        self._view_names = tuple(view_names)
        self._mask = Mask(options, card.training_positives)
        self._buffers = Buffers()
        self.num_samples = card.split("train").num_samples
        self.steps_per_epoch = share.steps(self.num_samples)
        self.has_gaps = share.trains_last or options.on_bad_sample is OnBadSample.skip
        self._bad = bad or BadSamples()
        _tell_sharing(len(card.split("train").shards), options, share)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's micro-batches of an epoch, from a step of it on."""
        options, share = self._options, self._share
        length, start = share.length(self.num_samples), start_step * share.global_batch_size
        order = Order(self._seed, epoch, options.lanes, options.shuffle_window, length, start)
        decoder = Decoder(self._views, self._view_names, self._mask, self._seed, epoch)
        stream = SampleStream(
            self._card,
            "train",
            order,
            rank=share.rank,
            world_size=share.world_size,
            transform=decoder,
            options=options,
        )
        items = loaded(stream, workers=options.workers, batch_size=share.micro_batch_size)
        rows = (self.steps_per_epoch - start_step) * share.global_batch_size // share.world_size
        examples = chain(map(self._bad.checked, items), repeat(None))
        for _ in range(rows // share.micro_batch_size):
            yield self._collated(islice(examples, share.micro_batch_size))

    def _collated(self, examples: Iterator[Example | None]) -> Batch:
        """Take a batch's examples one by one, and write each to its place while its pixels are in the cache."""
        num_views, side, size = len(self._view_names), self._views.image_size, self._share.micro_batch_size
        inputs = self._buffers.take(num_views, size, 3, side, side)
        known: list[Cells | None] = []
        observed: list[Cells | None] = []
        index, ids = [], []
        for place, example in enumerate(examples):
            if example is None:
                inputs[:, place] = 0
            else:
                self._views.normalise(example.drawn, inputs[:, place])
            known.append(example.known if example else None)
            observed.append(example.observed if example else None)
            index.append(example.index if example else -1)
            ids.append(example.sample_id if example else "")
        places = torch.tensor(index)
        return Batch(
            inputs=inputs.flatten(0, 1),
            observed=_dense(observed, self._card.num_classes),
            truth=_dense(known, self._card.num_classes),
            index=places,
            ids=tuple(ids),
            valid=places >= 0,
        )


def _dense(rows: list[Cells | None], num_classes: int) -> Tensor:
    labels = np.zeros((len(rows), num_classes), dtype=np.int8)
    for row, cells in zip(labels, rows, strict=True):
        if cells is not None:
            row[cells[0]] = cells[1]
    return torch.from_numpy(labels)


def _tell_sharing(num_shards: int, options: DataOptions, share: Share) -> None:
    """Say once where several readers go through the same tars, which costs reading but no sample."""
    workers = max(1, options.workers)
    readers = share.world_size * workers
    if share.rank == 0 and (options.lanes % readers or num_shards < readers):
        _log.info(
            "%d ranks x %d loader workers = %d readers share %d lanes of %d shards: some go through the same shards, "
            "each takes its own samples; more shards and data.lanes a multiple of %d would save reading",
            share.world_size,
            workers,
            readers,
            options.lanes,
            num_shards,
            readers,
        )


@dataclass(frozen=True)
class Features:
    """Cached features of one split: random [N, A, V, F], plain [N, F], truth [N, C] int8, index [N], ids.

    With cached regions [1 + R, F] stands for F, the pooled features first.
    A variants of V views; ``random`` is empty (A = 0) for splits that only evaluate. A skipped sample keeps its row:
    zeros, index -1, id "".
    """

    random: Tensor
    plain: Tensor
    truth: Tensor
    index: Tensor
    ids: tuple[str, ...]


class FeatureBatches:
    """Batches from cached features: an epoch draws one of the variants of each view of each sample."""

    def __init__(self, features: Features, mask: Mask, view_names: Sequence[str], share: Share, seed: int) -> None:
        """Mask the labels once; they do not change."""
        self._features, self._share, self._seed = features, share, seed
        self._views = [VIEW_NAMES.index(name) for name in view_names]
        # a row without a sample has no id, which a mask file would miss, and no label
        rows = [
            mask(row.numpy(), name) if name else row.numpy()
            for row, name in zip(features.truth, features.ids, strict=True)
        ]
        self._observed = torch.from_numpy(np.stack(rows))
        self.num_samples = len(features.ids)
        self.steps_per_epoch = share.steps(self.num_samples)
        self.has_gaps = share.trains_last or bool((features.index < 0).any())

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's micro-batches of an epoch, from a step of it on."""
        share = self._share
        generator = torch.Generator().manual_seed(derive(self._seed, "order", epoch))
        order = torch.randperm(self.num_samples, generator=generator)
        variants = self._features.random.shape[1]
        drawn = torch.randint(variants, (self.num_samples, len(self._views)), generator=generator)
        places = torch.full((self.steps_per_epoch * share.global_batch_size,), -1)
        length = share.length(self.num_samples)
        places[:length] = order[:length]
        mine = places[start_step * share.global_batch_size + share.rank :: share.world_size]
        for rows in torch.split(mine, share.micro_batch_size):
            yield self._batch(rows, drawn)

    def _batch(self, rows: Tensor, drawn: Tensor) -> Batch:
        """Return a batch of the given rows; -1 stands for none."""
        has_row = rows >= 0
        rows = rows.clamp_min(0)
        index = torch.where(has_row, self._features.index[rows], -1)
        valid = index >= 0
        views = [self._features.random[rows, drawn[rows, column], view] for column, view in enumerate(self._views)]
        inputs = torch.cat(views).float()
        is_there = valid.repeat(len(self._views)).view(-1, *[1] * (inputs.ndim - 1))
        return Batch(
            inputs=torch.where(is_there, inputs, 0.0),
            observed=torch.where(valid.unsqueeze(1), self._observed[rows], 0),
            truth=torch.where(valid.unsqueeze(1), self._features.truth[rows], 0),
            index=index,
            ids=tuple(self._features.ids[row] if ok else "" for row, ok in zip(rows.tolist(), valid, strict=True)),
            valid=valid,
        )
