"""What a training step receives, and where it comes from: shards decoded on the fly, or cached features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from scinet.data import mask_file
from scinet.data.buffers import Buffers
from scinet.data.card import DataCard
from scinet.data.masks import derive, observe
from scinet.data.stream import Order, SampleStream, StoredSample
from scinet.data.views import Drawn, Views, decode
from scinet.errors import ConfigError, DataError
from scinet.options import DataOptions


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank.

    inputs [V * B, 3, H, W] images, or [V * B, F] features, view by view; observed [B, C] int8, what the mask leaves;
    truth [B, C] int8, what the collection knows, for logging only; index [B] int64; ids, the stored sample ids.
    """

    inputs: Tensor
    observed: Tensor
    truth: Tensor
    index: Tensor
    ids: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(
            inputs=self.inputs.to(device, non_blocking=True),
            observed=self.observed.to(device, non_blocking=True),
            truth=self.truth.to(device, non_blocking=True),
            index=self.index.to(device, non_blocking=True),
            ids=self.ids,
        )


class BatchSource(Protocol):
    """Micro-batches of the training split in global order."""

    num_samples: int
    steps_per_epoch: int

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield this rank's micro-batches of an epoch, ``steps_per_epoch`` times the accumulation steps."""
        ...


@dataclass(frozen=True)
class Share:
    """Which part of each global batch a rank gets: every ``world_size``-th sample, in ``accumulation`` parts."""

    rank: int
    world_size: int
    global_batch_size: int
    accumulation: int

    def __post_init__(self) -> None:
        """Check that the global batch divides.

        Raises:
            ConfigError: with the arithmetic, if it does not.
        """
        parts = self.world_size * self.accumulation
        if self.global_batch_size % parts:
            raise ConfigError(
                f"train.global_batch_size={self.global_batch_size} does not divide over {self.world_size} ranks x "
                f"{self.accumulation} accumulation steps: set it to a multiple of {parts}"
            )

    @property
    def micro_batch_size(self) -> int:
        """B, samples a rank sees at once."""
        return self.global_batch_size // (self.world_size * self.accumulation)

    def steps(self, num_samples: int) -> int:
        """Return the full global batches in a pass; the short rest is left to the next epoch's order.

        Raises:
            ConfigError: if there is none.
        """
        if num_samples < self.global_batch_size:
            raise ConfigError(
                f"train.global_batch_size={self.global_batch_size} is more than the {num_samples} training samples"
            )
        return num_samples // self.global_batch_size


class Mask:
    """The label mask of a run, applied to one sample at a time."""

    def __init__(self, options: DataOptions) -> None:
        """Take the known ratio and the mask seed, or the file."""
        self._options = options
        self._table = mask_file.load(Path(options.mask_file)) if options.mask_file else None

    def __call__(self, truth: npt.NDArray[np.int8], sample_id: str) -> npt.NDArray[np.int8]:
        """Return observed [C] int8 from truth [C] int8."""
        options = self._options
        if self._table is not None:
            return self._table.observe(sample_id)
        return observe(
            truth,
            sample_id,
            known_ratio=options.known_ratio,
            seed=options.mask_seed,
            single_positive=options.single_positive,
        )


@dataclass(frozen=True)
class _Example:
    drawn: Drawn
    observed: Tensor
    truth: Tensor
    index: int
    sample_id: str


@dataclass(frozen=True)
class _Decoder:
    """Sample to views; a class rather than a closure so that loader processes can receive it."""

    views: Views
    view_names: tuple[str, ...]
    mask: Mask
    seed: int
    epoch: int

    def __call__(self, sample: StoredSample) -> _Example:
        image = decode(sample.image, sample.where, enough_pixels=self.views.enough_pixels)
        drawn = self.views.draw(image, self.view_names, seed=self.seed, epoch=self.epoch, sample_id=sample.sample_id)
        observed = self.mask(sample.truth, sample.sample_id)
        return _Example(
            drawn,
            torch.from_numpy(observed),
            torch.from_numpy(sample.truth),
            sample.index,
            sample.sample_id,
        )


class ImageBatches:
    """Batches from the shards, decoded and augmented on the fly."""

    def __init__(
        self, card: DataCard, options: DataOptions, views: Views, view_names: Sequence[str], share: Share, seed: int
    ) -> None:
        """Check that the batches divide; nothing is read yet."""
        self._card, self._options, self._views, self._share, self._seed = card, options, views, share, seed
        self._view_names = tuple(view_names)
        self._mask = Mask(options)
        self._buffers = Buffers()
        self.num_samples = card.split("train").num_samples
        self.steps_per_epoch = share.steps(self.num_samples)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield this rank's micro-batches of an epoch."""
        options, share = self._options, self._share
        length = self.steps_per_epoch * share.global_batch_size
        order = Order(self._seed, epoch, options.lanes, options.shuffle_window, length)
        decoder = _Decoder(self._views, self._view_names, self._mask, self._seed, epoch)
        stream = SampleStream(
            self._card, "train", order, rank=share.rank, world_size=share.world_size, transform=decoder
        )
        loader = DataLoader(stream, batch_size=None, num_workers=options.workers)
        gathered: list[_Example] = []
        for example in loader:
            if isinstance(example, DataError):
                raise example
            gathered.append(example)
            if len(gathered) == share.micro_batch_size:
                yield self._collate(gathered)
                gathered = []

    def _collate(self, examples: list[_Example]) -> Batch:
        num_views, side = len(self._view_names), self._views.image_size
        inputs = self._buffers.take(num_views, len(examples), 3, side, side)
        for place, example in enumerate(examples):
            self._views.normalise(example.drawn, inputs[:, place])
        return Batch(
            inputs=inputs.flatten(0, 1),
            observed=torch.stack([e.observed for e in examples]),
            truth=torch.stack([e.truth for e in examples]),
            index=torch.tensor([e.index for e in examples]),
            ids=tuple(e.sample_id for e in examples),
        )


@dataclass(frozen=True)
class Features:
    """Cached features of one split: random [N, A, V, F], plain [N, F], truth [N, C] int8, index [N], ids.

    A variants of V views; ``random`` is empty (A = 0) for splits that only evaluate.
    """

    random: Tensor
    plain: Tensor
    truth: Tensor
    index: Tensor
    ids: tuple[str, ...]


class FeatureBatches:
    """Batches from cached features: an epoch draws one of the variants of each view of each sample."""

    def __init__(self, features: Features, options: DataOptions, num_views: int, share: Share, seed: int) -> None:
        """Mask the labels once; they do not change."""
        self._features, self._num_views, self._share, self._seed = features, num_views, share, seed
        mask = Mask(options)
        rows = [mask(row.numpy(), name) for row, name in zip(features.truth, features.ids, strict=True)]
        self._observed = torch.from_numpy(np.stack(rows))
        self.num_samples = len(features.ids)
        self.steps_per_epoch = share.steps(self.num_samples)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield this rank's micro-batches of an epoch."""
        share = self._share
        generator = torch.Generator().manual_seed(derive(self._seed, "order", epoch))
        order = torch.randperm(self.num_samples, generator=generator)
        variants = self._features.random.shape[1]
        drawn = torch.randint(variants, (self.num_samples, self._num_views), generator=generator)
        length = self.steps_per_epoch * share.global_batch_size
        mine = order[:length][share.rank :: share.world_size]
        for rows in torch.split(mine, share.micro_batch_size):
            views = [self._features.random[rows, drawn[rows, view], view] for view in range(self._num_views)]
            yield Batch(
                inputs=torch.cat(views).float(),
                observed=self._observed[rows],
                truth=self._features.truth[rows],
                index=self._features.index[rows],
                ids=tuple(self._features.ids[row] for row in rows.tolist()),
            )
