"""The cache of frozen features: each sample's views once through the trunk, then training takes seconds."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scinet.data.batch import Features
from scinet.data.card import DataCard
from scinet.data.stream import BadSamples, StoredSample, check_skipped, read_evenly
from scinet.data.views import SHARD_FORMATS, VIEW_NAMES, Views, decode
from scinet.distributed import Ranks, gather_objects, gather_rows, sum_over_ranks
from scinet.errors import DataError
from scinet.model.network import Network, natively_bf16
from scinet.options import DataOptions, OnBadSample, Options

_log = logging.getLogger(__name__)
_RECIPE = "2"


def ensure(
    network: Network,
    card: DataCard,
    split: str,
    options: Options,
    views: Views,
    ranks: Ranks,
    *,
    weights_sha256: str,
    cache: Path,
    progress: Callable[[int, int], None],
) -> Features:
    """Return a split's features, computed once and kept. Collective.

    The variants are drawn with a seed of their own, so that runs of all seeds share one cache.

    Args:
        network: with a frozen trunk.
        card: of the shards.
        split: ``train`` gets random variants, the others only the plain view.
        options: the whole configuration.
        views: the transforms.
        ranks: this process.
        weights_sha256: of the trunk.
        cache: folder of derived files.
        progress: called with samples done and samples in all.
    """
    variants = options.data.cached_variants if split == "train" else 0
    described = [_RECIPE, card.sha256, weights_sha256, split, variants, options.model.image_size]
    described += [options.data.smallest_crop, natively_bf16(ranks.device)]
    if options.data.cached_regions:
        described.append(f"regions {options.data.cached_regions}")
    if options.data.on_bad_sample is OnBadSample.skip:
        described.append("skip")  # may have rows without a sample, which `stop` would not take
    digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
    path = cache / "features" / f"{card.name}-{split}-{digest}.safetensors"
    # counted over ranks: where the cache is not shared, all must compute together or one would wait for ever
    has_cache = int(sum_over_ranks(torch.tensor(int(path.is_file()), device=ranks.device), ranks))
    if has_cache < ranks.world_size:
        features = _compute(network, card, split, variants, views, options.data, ranks, progress)
        if ranks.is_first:
            _save(features, path)
    else:
        features = _load(path)
    skipped = int((features.index < 0).sum())
    check_skipped(skipped, len(features.index), options.data.max_bad_fraction)
    return features


def _compute(
    network: Network,
    card: DataCard,
    split: str,
    variants: int,
    views: Views,
    data: DataOptions,
    ranks: Ranks,
    progress: Callable[[int, int], None],
) -> Features:
    total = card.split(split).num_samples
    every_view = _EveryView(views, variants)
    stream = read_evenly(card, split, rank=ranks.rank, world_size=ranks.world_size, transform=every_view, options=data)
    rows = -(-total // ranks.world_size)
    # filled in place: thousands of small results kept between large temporaries fragmented the heap, 2 MiB an image
    made: Features | None = None
    ids = [""] * rows
    for row, example in enumerate(map(BadSamples().checked, stream)):
        if example is not None or made is None:  # a row without a sample is empty, but its width is the network's
            drawn = every_view.blank() if example is None else example.drawn
            features = network.extract(drawn.to(ranks.device), side=data.cached_regions).cpu()
            made = made or empty(rows, variants, features.shape[1:], card.num_classes)
        if example is not None:
            made.random[row] = features[:-1].view(made.random.shape[1:])
            made.plain[row] = features[-1]
            made.truth[row] = torch.from_numpy(example.sample.truth)
            made.index[row] = example.sample.index
            ids[row] = example.sample.sample_id
        progress(min((row + 1) * ranks.world_size, total), total)
    assert made is not None, "a split has samples"

    def gathered(column: Tensor) -> Tensor:
        return gather_rows(column.to(ranks.device), ranks)[:total].cpu()

    return Features(
        random=gathered(made.random),
        plain=gathered(made.plain),
        truth=gathered(made.truth),
        index=gathered(made.index),
        ids=tuple(gather_objects(ids, ranks)[:total]),
    )


@dataclass(frozen=True)
class _Example:
    sample: StoredSample
    drawn: Tensor


@dataclass(frozen=True)
class _EveryView:
    """Sample to its random views, variant by variant, and the plain one: [A * V + 1, 3, H, W]."""

    views: Views
    variants: int

    def __call__(self, sample: StoredSample) -> _Example:
        image = decode(sample.image, sample.where, formats=SHARD_FORMATS)
        drawn = [
            self.views.random(image, name, seed=0, epoch=variant, sample_id=sample.sample_id)
            for variant in range(self.variants)
            for name in VIEW_NAMES
        ]
        return _Example(sample, torch.stack([*drawn, self.views.plain(image)]))

    def blank(self) -> Tensor:
        side = self.views.image_size
        return torch.zeros(self.variants * len(VIEW_NAMES) + 1, 3, side, side)


def shape(width: int, side: int) -> tuple[int, ...]:
    """Return what is cached of an image: [F], or [1 + g^2, F] with a grid of regions after the pooled features.

    Args:
        width: F.
        side: g, ``data.cached_regions``.
    """
    return (1 + side**2, width) if side else (width,)


def empty(rows: int, variants: int, shape: Sequence[int], num_classes: int) -> Features:
    """Return the cache of ``rows`` samples, not filled yet: ``variants`` of each view and a plain one, of a shape."""
    return Features(
        random=torch.zeros(rows, variants, len(VIEW_NAMES), *shape, dtype=torch.float16),
        plain=torch.zeros(rows, *shape),
        truth=torch.zeros(rows, num_classes, dtype=torch.int8),
        index=torch.full((rows,), -1),
        ids=(),
    )


def _save(features: Features, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    tensors = {name: getattr(features, name).contiguous() for name in ("random", "plain", "truth", "index")}
    save_file(tensors, str(temporary), metadata={"ids": json.dumps(features.ids)})
    temporary.rename(path)
    _log.info("features kept in %s (%.0f MiB)", path, path.stat().st_size / 2**20)


def _load(path: Path) -> Features:
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("random", "plain", "truth", "index")}
            return Features(**tensors, ids=tuple(json.loads(file.metadata()["ids"])))
    except (SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"the feature cache {path} is damaged ({error}): remove the file, it is made anew") from error
