"""The union of the ranks' batches is the batch of one rank, in interleaved order."""

from __future__ import annotations

import dataclasses
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scinet.data import mask_file
from scinet.data.batch import Batch, BatchSource, FeatureBatches, Features, ImageBatches, Share
from scinet.data.card import DataCard
from scinet.data.mask_file import Header, Row
from scinet.data.masks import observe
from scinet.data.stream import Order, SampleStream
from scinet.data.views import Normalisation, Views, decode
from scinet.errors import ConfigError, DataError
from scinet.options import DataOptions
from tests.scinet.conftest import MakeShards

VIEWS = Views(8, Normalisation((0.5,) * 3, (0.5,) * 3), smallest_crop=0.5)
OPTIONS = DataOptions(known_ratio=0.5, lanes=4, shuffle_window=3)
SHARES = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 3), (6, 2)]


@pytest.fixture(scope="module")
def shards(make_shards: MakeShards) -> DataCard:
    return make_shards(29, shard_samples=6)


@pytest.fixture(scope="module")
def features() -> Features:
    generator = torch.Generator().manual_seed(0)
    num_samples, variants, num_views, width = 29, 4, 3, 5
    return Features(
        random=torch.randn(num_samples, variants, num_views, width, generator=generator).half(),
        plain=torch.randn(num_samples, width, generator=generator),
        truth=torch.randint(-1, 2, (num_samples, 3), generator=generator).to(torch.int8),
        index=torch.arange(100, 100 + num_samples),
        ids=tuple(f"id-{n}" for n in range(num_samples)),
    )


def _rows(batch: Batch, num_views: int) -> list[tuple[object, ...]]:
    """Return each sample of a batch as something that can be compared."""
    views = batch.inputs.reshape(num_views, -1, *batch.inputs.shape[1:]).transpose(0, 1)
    columns = (views, batch.observed, batch.truth, batch.index)
    return [(name, *(column[row].tolist() for column in columns)) for row, name in enumerate(batch.ids)]


def _samples(source: BatchSource, num_views: int, epoch: int = 0) -> list[tuple[object, ...]]:
    return list(chain.from_iterable(_rows(batch, num_views) for batch in source.epoch(epoch)))


@pytest.mark.parametrize(("world_size", "accumulation"), SHARES)
def test_image_batches_of_all_ranks_are_those_of_one_when_interleaved(
    shards: DataCard, world_size: int, accumulation: int
) -> None:
    def source(rank: int, world_size: int, accumulation: int) -> ImageBatches:
        share = Share(rank, world_size, 12, accumulation)
        return ImageBatches(shards, OPTIONS, VIEWS, ("weak", "strong"), share, seed=5)

    alone = _samples(source(0, 1, 1), 2)
    assert len(alone) == 24
    for rank in range(world_size):
        mine = source(rank, world_size, accumulation)
        sizes = [len(batch.ids) for batch in mine.epoch(0)]
        assert sizes == [12 // world_size // accumulation] * (2 * accumulation)
        assert _samples(mine, 2) == alone[rank::world_size]


@pytest.mark.parametrize(("world_size", "accumulation"), SHARES)
def test_feature_batches_of_all_ranks_are_those_of_one_when_interleaved(
    features: Features, world_size: int, accumulation: int
) -> None:
    alone = _samples(FeatureBatches(features, OPTIONS, 3, Share(0, 1, 12, 1), seed=5), 3)
    assert len(alone) == len({row[0] for row in alone}) == 24
    for rank in range(world_size):
        mine = FeatureBatches(features, OPTIONS, 3, Share(rank, world_size, 12, accumulation), seed=5)
        assert mine.steps_per_epoch == 2
        assert [len(b.ids) for b in mine.epoch(0)] == [12 // world_size // accumulation] * (2 * accumulation)
        assert _samples(mine, 3) == alone[rank::world_size]


def test_image_batch_holds_the_sample_it_names_when_read(shards: DataCard) -> None:
    stored = {s.sample_id: s for s in SampleStream(shards, "train", Order(0, 0, 1, 0))}
    source = ImageBatches(shards, OPTIONS, VIEWS, ("weak", "medium", "strong"), Share(0, 1, 7, 1), seed=5)
    batch = next(iter(source.epoch(2)))
    assert batch.inputs.shape == (21, 3, 8, 8)
    assert (batch.observed.dtype, batch.truth.dtype, batch.index.dtype) == (torch.int8, torch.int8, torch.int64)
    for row, name in enumerate(batch.ids):
        sample = stored[name]
        assert batch.index[row] == sample.index
        np.testing.assert_array_equal(batch.truth[row].numpy(), sample.truth)
        observed = observe(sample.truth, name, known_ratio=0.5, seed=0)
        np.testing.assert_array_equal(batch.observed[row].numpy(), observed)
        image = decode(sample.image, "")
        for view, view_name in enumerate(("weak", "medium", "strong")):
            expected = VIEWS.random(image, view_name, seed=5, epoch=2, sample_id=name)
            assert torch.equal(batch.inputs[view * 7 + row], expected)


def test_feature_batch_holds_the_sample_it_names_when_read(features: Features) -> None:
    source = FeatureBatches(features, OPTIONS, 3, Share(0, 1, 29, 1), seed=5)
    (batch,) = source.epoch(0)
    assert sorted(batch.ids) == sorted(features.ids)
    assert batch.inputs.dtype == torch.float32
    for row, name in enumerate(batch.ids):
        place = features.ids.index(name)
        assert batch.index[row] == features.index[place]
        assert torch.equal(batch.truth[row], features.truth[place])
        observed = observe(features.truth[place].numpy(), name, known_ratio=0.5, seed=0)
        np.testing.assert_array_equal(batch.observed[row].numpy(), observed)
        for view in range(3):
            variants = features.random[place, :, view].float()
            assert (variants == batch.inputs[view * 29 + row]).all(1).any()


def test_epochs_differ_in_order_and_variants_when_they_follow_each_other(features: Features) -> None:
    source = FeatureBatches(features, OPTIONS, 3, Share(0, 1, 29, 1), seed=5)
    first, second, again = (_samples(source, 3, epoch) for epoch in (0, 1, 0))
    assert first == again
    assert [row[0] for row in first] != [row[0] for row in second]
    assert sorted(map(str, first)) != sorted(map(str, second))
    assert [row[2:] for row in sorted(first)] == [row[2:] for row in sorted(second)]


def test_batch_keeps_everything_when_moved(features: Features) -> None:
    batch = next(iter(FeatureBatches(features, OPTIONS, 3, Share(0, 1, 4, 1), seed=5).epoch(0)))
    assert _rows(batch.to(torch.device("cpu")), 3) == _rows(batch, 3)


@pytest.mark.parametrize(
    ("world_size", "batch_size", "accumulation", "multiple"), [(3, 16, 1, 3), (2, 6, 2, 4), (1, 5, 2, 2)]
)
def test_arithmetic_is_said_when_the_global_batch_does_not_divide(
    world_size: int, batch_size: int, accumulation: int, multiple: int
) -> None:
    with pytest.raises(ConfigError) as caught:
        Share(0, world_size, batch_size, accumulation)
    message = str(caught.value)
    assert f"train.global_batch_size={batch_size} does not divide over {world_size} ranks" in message
    assert f"{accumulation} accumulation steps" in message
    assert message.endswith(f"a multiple of {multiple}")


def test_both_sizes_are_said_when_the_global_batch_exceeds_the_samples(features: Features, shards: DataCard) -> None:
    share = Share(0, 1, 30, 1)
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=30 is more than the 29 training samples"):
        FeatureBatches(features, OPTIONS, 3, share, seed=0)
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=30 is more than the 29 training samples"):
        ImageBatches(shards, OPTIONS, VIEWS, ("weak",), share, seed=0)


@settings(deadline=None, max_examples=25)
@given(
    world_size=st.integers(1, 64), micro=st.integers(1, 64), accumulation=st.integers(1, 8), rest=st.integers(0, 10**6)
)
def test_share_adds_up_when_it_divides(world_size: int, micro: int, accumulation: int, rest: int) -> None:
    share = Share(0, world_size, world_size * micro * accumulation, accumulation)
    assert share.micro_batch_size == micro
    num_samples = share.global_batch_size + rest
    steps = share.steps(num_samples)
    assert steps * share.global_batch_size <= num_samples < (steps + 1) * share.global_batch_size


def test_labels_are_those_of_the_file_when_a_mask_file_is_given(
    shards: DataCard, features: Features, tmp_path: Path
) -> None:
    path = tmp_path / "mask.jsonl"
    header = Header(shards.class_names, "", "train", "", 29, None, False, None)
    names = [*(f"train-{number:04d}" for number in range(29)), *features.ids]
    mask_file.write(path, header, [Row(name, (number % 3,), ((number + 2) % 3,)) for number, name in enumerate(names)])
    options = dataclasses.replace(OPTIONS, mask_file=str(path), workers=2)
    for source in (
        ImageBatches(shards, options, VIEWS, ("weak",), Share(0, 1, 7, 1), seed=5),
        FeatureBatches(features, options, 3, Share(0, 1, 29, 1), seed=5),
    ):
        for batch in source.epoch(0):
            for name, row in zip(batch.ids, batch.observed, strict=True):
                number = names.index(name)
                assert (row[number % 3], row[(number + 2) % 3], row[(number + 1) % 3]) == (1, -1, 0)


def test_features_are_refused_when_the_mask_file_lacks_one(features: Features, tmp_path: Path) -> None:
    path = tmp_path / "mask.jsonl"
    mask_file.write(path, Header(("a", "b", "c"), "", "", "", 0, None, False, None), [Row(features.ids[0], (), ())])
    with pytest.raises(DataError, match="no sample 'id-1'"):
        FeatureBatches(features, dataclasses.replace(OPTIONS, mask_file=str(path)), 3, Share(0, 1, 29, 1), seed=5)
