"""The union of the ranks' batches is the batch of one rank, in interleaved order."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scinet.data import mask_file
from scinet.data.batch import Batch, BatchSource, FeatureBatches, Features, ImageBatches
from scinet.data.card import DataCard
from scinet.data.examples import Mask
from scinet.data.mask_file import Header, Row
from scinet.data.masks import annotated, class_ratios, observe
from scinet.data.share import Share
from scinet.data.stream import Order, SampleStream
from scinet.data.views import VIEW_NAMES, Drawn, Normalisation, Views, decode
from scinet.errors import ConfigError, DataError
from scinet.options import DataOptions, OnBadSample
from tests.scinet.conftest import MakeShards, spoil

VIEWS = Views(8, Normalisation((0.5,) * 3, (0.5,) * 3), smallest_crop=0.5)
OPTIONS = DataOptions(known_ratio=0.5, lanes=4, shuffle_window=3)
HARD = dataclasses.replace(OPTIONS, class_ratio_spread=1.0, annotated_classes=0.5, flipped_labels=0.4)
COUNTS = (10, 11, 8)
MASK = Mask(OPTIONS, COUNTS)
SHARES = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 3), (6, 2)]


@pytest.fixture(scope="module")
def shards(make_shards: MakeShards) -> DataCard:
    return make_shards(29, shard_samples=6)


@pytest.fixture(params=[(5,), (1 + 4, 5)], ids=["pooled", "with regions"])
def features(request: pytest.FixtureRequest) -> Features:
    generator = torch.Generator().manual_seed(0)
    num_samples, variants, num_views = 29, 4, 3
    return Features(
        random=torch.randn(num_samples, variants, num_views, *request.param, generator=generator).half(),
        plain=torch.randn(num_samples, *request.param, generator=generator),
        truth=torch.randint(-1, 2, (num_samples, 3), generator=generator).to(torch.int8),
        index=torch.arange(100, 100 + num_samples),
        ids=tuple(f"id-{n}" for n in range(num_samples)),
    )


def _rows(batch: Batch, num_views: int) -> list[tuple[object, ...]]:
    """Return each sample of a batch as something that can be compared."""
    views = batch.inputs.reshape(num_views, -1, *batch.inputs.shape[1:]).transpose(0, 1)
    columns = (views, batch.observed, batch.truth, batch.index, batch.valid)
    return [(name, *(column[row].tolist() for column in columns)) for row, name in enumerate(batch.ids)]


def _samples(source: BatchSource, num_views: int, epoch: int = 0, start_step: int = 0) -> list[tuple[object, ...]]:
    return list(chain.from_iterable(_rows(batch, num_views) for batch in source.epoch(epoch, start_step)))


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
    alone = _samples(FeatureBatches(features, MASK, VIEW_NAMES, Share(0, 1, 12, 1), seed=5), 3)
    assert len(alone) == len({row[0] for row in alone}) == 24
    for rank in range(world_size):
        mine = FeatureBatches(features, MASK, VIEW_NAMES, Share(rank, world_size, 12, accumulation), seed=5)
        assert mine.steps_per_epoch == 2
        assert [len(b.ids) for b in mine.epoch(0)] == [12 // world_size // accumulation] * (2 * accumulation)
        assert _samples(mine, 3) == alone[rank::world_size]


@pytest.fixture(params=["images", "features"])
def make_hard(request: pytest.FixtureRequest, shards: DataCard) -> Callable[[Share], BatchSource]:
    """Batches whose labels are spread, flipped and of two classes only, from the shards or from features of them."""
    options = dataclasses.replace(HARD, known_ratio=0.8)
    if request.param == "images":
        return lambda share: ImageBatches(shards, options, VIEWS, ("weak",), share, seed=5)
    stored = list(SampleStream(shards, "train", Order(0, 0, 1, 0)))
    features = Features(
        random=torch.zeros(29, 1, 1, 5),
        plain=torch.zeros(29, 5),
        truth=torch.from_numpy(np.stack([sample.truth for sample in stored])),
        index=torch.tensor([sample.index for sample in stored]),
        ids=tuple(sample.sample_id for sample in stored),
    )
    mask = Mask(options, shards.training_positives)
    return lambda share: FeatureBatches(features, mask, VIEW_NAMES[:1], share, seed=5)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_labels_are_equal_in_images_and_features_at_any_world_size_when_some_are_wrong(
    make_hard: Callable[[Share], BatchSource], shards: DataCard, world_size: int
) -> None:
    shares = [Share(rank, world_size, 12, 1, trains_last=True) for rank in range(world_size)]
    batches = [batch for share in shares for batch in make_hard(share).epoch(0)]
    observed, truth = (
        {name: row for batch in batches for name, row in zip(batch.ids, getattr(batch, column), strict=True) if name}
        for column in ("observed", "truth")
    )
    assert len(observed) == 29
    is_annotated, ratios = annotated(0.5, shards.training_positives), class_ratios(0.8, 3, spread=1.0, seed=0)
    for sample in SampleStream(shards, "train", Order(0, 0, 1, 0)):
        expected = observe(sample.truth, sample.sample_id, known_ratio=ratios, seed=0, flipped=0.4) * is_annotated
        assert observed[sample.sample_id].tolist() == expected.tolist()
        assert truth[sample.sample_id].tolist() == sample.truth.tolist()
    rows = torch.stack([observed[name] * truth[name] for name in observed])
    assert set(rows[:, is_annotated].flatten().tolist()) == {-1, 0, 1}
    assert not rows[:, ~is_annotated].any()


def test_positive_is_one_of_the_annotated_classes_when_one_is_known() -> None:
    mask = Mask(DataOptions(single_positive=True, annotated_classes=0.5), (1, 5, 5, 1))
    rows = np.stack([mask(np.ones(4, dtype=np.int8), str(number)) for number in range(40)])
    assert rows.sum(1).tolist() == [1] * 40
    assert (rows.sum(0) > 0).tolist() == [False, True, True, False]


Make = Callable[[Share, DataOptions], BatchSource]


@pytest.fixture(params=["images", "features"])
def make_source(request: pytest.FixtureRequest, shards: DataCard, features: Features) -> Make:
    def make(share: Share, options: DataOptions) -> BatchSource:
        if request.param == "images":
            return ImageBatches(shards, options, VIEWS, ("weak", "strong"), share, seed=5)
        return FeatureBatches(features, Mask(options, COUNTS), VIEW_NAMES[:2], share, seed=5)

    return make


@pytest.mark.parametrize(("world_size", "accumulation"), SHARES)
def test_last_batch_is_equal_at_any_share_when_it_is_trained(
    make_source: Make, world_size: int, accumulation: int
) -> None:
    whole = _samples(make_source(Share(0, 1, 12, 1), OPTIONS), 2)
    alone = _samples(make_source(Share(0, 1, 12, 1, trains_last=True), OPTIONS), 2)
    assert alone[:24] == whole
    assert len(alone) == 36
    assert [row[-1] for row in alone] == [True] * 29 + [False] * 7
    assert len({row[0] for row in alone[:29]}) == 29
    for name, views, observed, truth, index, _ in alone[29:]:
        assert (name, index) == ("", -1)
        assert not np.any(views)
        assert not np.any(observed)
        assert not np.any(truth)
    for rank in range(world_size):
        mine = make_source(Share(rank, world_size, 12, accumulation, trains_last=True), OPTIONS)
        assert mine.steps_per_epoch == 3
        assert mine.has_gaps
        assert [len(b.ids) for b in mine.epoch(0)] == [12 // world_size // accumulation] * (3 * accumulation)
        assert _samples(mine, 2) == alone[rank::world_size]


@pytest.mark.parametrize("start_step", [0, 1, 2, 3])
@pytest.mark.parametrize("trains_last", [True, False])
@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (3, 2)])
def test_epoch_goes_on_with_the_very_next_sample_when_it_begins_at_a_step(
    make_source: Make, world_size: int, accumulation: int, start_step: int, *, trains_last: bool
) -> None:
    whole = _samples(make_source(Share(0, 1, 12, 1, trains_last=trains_last), OPTIONS), 2, epoch=1)
    for rank in range(world_size):
        share = Share(rank, world_size, 12, accumulation, trains_last=trains_last)
        rest = _samples(make_source(share, OPTIONS), 2, epoch=1, start_step=start_step)
        assert rest == whole[start_step * 12 :][rank::world_size]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_epoch_is_equal_when_loader_processes_begin_at_a_step(shards: DataCard, workers: int) -> None:
    share = Share(1, 2, 6, 1, trains_last=True)
    alone = ImageBatches(shards, OPTIONS, VIEWS, ("weak",), share, seed=5)
    loaded = ImageBatches(shards, dataclasses.replace(OPTIONS, workers=workers), VIEWS, ("weak",), share, seed=5)
    assert _samples(loaded, 1, epoch=2, start_step=1) == _samples(alone, 1, epoch=2, start_step=1)


@pytest.fixture(scope="module")
def spoilt(make_shards: MakeShards) -> DataCard:
    return spoil(make_shards(29, shard_samples=6), "train-0003", "train-0011")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_place_stays_empty_when_a_bad_sample_is_skipped(
    shards: DataCard, spoilt: DataCard, world_size: int, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole = _samples(ImageBatches(shards, OPTIONS, VIEWS, ("weak",), Share(0, 1, 6, 1, trains_last=True), seed=5), 1)
    options = dataclasses.replace(OPTIONS, on_bad_sample=OnBadSample.skip, workers=workers)
    parts = []
    for rank in range(world_size):
        source = ImageBatches(
            spoilt, options, VIEWS, ("weak",), Share(rank, world_size, 6, 1, trains_last=True), seed=5
        )
        parts.append(_samples(source, 1))
        assert _samples(source, 1) == parts[-1]
    found = [parts[place % world_size][place // world_size] for place in range(30)]
    for row, want in zip(found, whole, strict=True):
        bad = want[0] in ("train-0003", "train-0011")
        assert row[0] == ("" if bad else want[0])
        assert row[-1] == (want[-1] and not bad)
        assert bad or row == want
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2, "each is named once, in however many epochs"
    assert all("cannot be decoded" in warning and ".tar" in warning for warning in warnings)


class _Killer(Views):
    """Views whose third image costs the process its life."""

    def draw(self, image: Tensor, names: Sequence[str], *, seed: int, epoch: int, sample_id: str) -> Drawn:
        if sample_id == "train-0003":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().draw(image, names, seed=seed, epoch=epoch, sample_id=sample_id)


@pytest.mark.timeout(60)
def test_remedy_is_said_when_a_loader_process_is_killed(shards: DataCard) -> None:
    views = _Killer(8, Normalisation((0.5,) * 3, (0.5,) * 3), smallest_crop=0.5)
    options = dataclasses.replace(OPTIONS, workers=1)
    source = ImageBatches(shards, options, views, ("weak",), Share(0, 1, 7, 1), seed=5)
    with pytest.raises(DataError, match=r"a loader process ended.*(killed by signal|exited).*lower data\.workers"):
        _samples(source, 1)


def test_sharing_is_said_once_when_there_are_fewer_shards_than_readers(
    shards: DataCard, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for rank in range(8):
        ImageBatches(shards, OPTIONS, VIEWS, ("weak",), Share(rank, 8, 8, 1), seed=5)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "8 ranks x 1 loader workers = 8 readers share 4 lanes of 5 shards" in message


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
    source = FeatureBatches(features, MASK, VIEW_NAMES, Share(0, 1, 29, 1), seed=5)
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


@pytest.mark.parametrize("names", [("weak",), ("strong",), ("weak", "strong"), ("strong", "medium", "weak")])
def test_feature_batch_has_the_named_views_each_of_a_variant_of_its_own(
    features: Features, names: tuple[str, ...]
) -> None:
    source = FeatureBatches(features, MASK, names, Share(0, 1, 29, 1), seed=5)
    (batch,) = source.epoch(0)
    drawn = []
    for row, name in enumerate(batch.ids):
        variants = features.random[features.ids.index(name)].float()
        for place, view in enumerate(VIEW_NAMES.index(name) for name in names):
            same = (variants[:, view] == batch.inputs[place * 29 + row]).flatten(1).all(1)
            assert same.sum() == 1, "the view that is named, in one variant"
            drawn.append(int(same.int().argmax()))
    assert set(drawn) == {0, 1, 2, 3}
    rows = torch.tensor(drawn).view(29, len(names))
    assert len(names) == 1 or not torch.equal(rows[:, 0], rows[:, 1])


def test_source_says_whether_a_row_may_be_without_a_sample(shards: DataCard, features: Features) -> None:
    skip = dataclasses.replace(OPTIONS, on_bad_sample=OnBadSample.skip)
    missing = dataclasses.replace(features, index=features.index.index_fill(0, torch.tensor([3]), -1))
    for trains_last in (True, False):
        share = Share(0, 1, 6, 1, trains_last=trains_last)

        def from_images(options: DataOptions, share: Share = share) -> bool:
            return ImageBatches(shards, options, VIEWS, ("weak",), share, seed=5).has_gaps

        def from_features(found: Features, share: Share = share) -> bool:
            return FeatureBatches(found, MASK, VIEW_NAMES, share, seed=5).has_gaps

        assert (from_images(OPTIONS), from_images(skip)) == (trains_last, True)
        assert (from_features(features), from_features(missing)) == (trains_last, True)


def test_seed_decides_the_order_of_features_and_their_variants(features: Features) -> None:
    first, again, other = (
        _samples(FeatureBatches(features, MASK, VIEW_NAMES, Share(0, 1, 29, 1), seed=seed), 3) for seed in (5, 5, 6)
    )
    assert first == again
    assert [row[0] for row in first] != [row[0] for row in other]
    assert sorted(map(str, first)) != sorted(map(str, other))


@pytest.mark.parametrize("kind", ["images", "features"])
def test_mask_is_drawn_by_its_own_seed(shards: DataCard, features: Features, kind: str) -> None:
    def observed(mask_seed: int, seed: int) -> dict[str, list[int]]:
        options = dataclasses.replace(OPTIONS, mask_seed=mask_seed)
        share = Share(0, 1, 29, 1)
        source: BatchSource = (
            ImageBatches(shards, options, VIEWS, ("weak",), share, seed=seed)
            if kind == "images"
            else FeatureBatches(features, Mask(options, COUNTS), VIEW_NAMES, share, seed=seed)
        )
        (batch,) = source.epoch(0)
        return dict(zip(batch.ids, batch.observed.tolist(), strict=True))

    assert observed(0, 5) == observed(0, 6)
    assert observed(0, 5) != observed(1, 5)


def test_epochs_differ_in_order_and_variants_when_they_follow_each_other(features: Features) -> None:
    source = FeatureBatches(features, MASK, VIEW_NAMES, Share(0, 1, 29, 1), seed=5)
    first, second, again = (_samples(source, 3, epoch) for epoch in (0, 1, 0))
    assert first == again
    assert [row[0] for row in first] != [row[0] for row in second]
    assert sorted(map(str, first)) != sorted(map(str, second))
    assert [row[2:] for row in sorted(first)] == [row[2:] for row in sorted(second)]


def test_batch_keeps_everything_when_moved(features: Features) -> None:
    batch = next(iter(FeatureBatches(features, MASK, VIEW_NAMES, Share(0, 1, 4, 1), seed=5).epoch(0)))
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
        FeatureBatches(features, MASK, VIEW_NAMES, share, seed=0)
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
        FeatureBatches(features, Mask(options, COUNTS), VIEW_NAMES, Share(0, 1, 29, 1), seed=5),
    ):
        for batch in source.epoch(0):
            for name, row in zip(batch.ids, batch.observed, strict=True):
                number = names.index(name)
                assert (row[number % 3], row[(number + 2) % 3], row[(number + 1) % 3]) == (1, -1, 0)


def test_features_are_refused_when_the_mask_file_lacks_one(features: Features, tmp_path: Path) -> None:
    path = tmp_path / "mask.jsonl"
    mask_file.write(path, Header(("a", "b", "c"), "", "", "", 0, None, False, None), [Row(features.ids[0], (), ())])
    with pytest.raises(DataError, match="no sample 'id-1'"):
        FeatureBatches(
            features,
            Mask(dataclasses.replace(OPTIONS, mask_file=str(path)), COUNTS),
            VIEW_NAMES,
            Share(0, 1, 29, 1),
            seed=5,
        )
