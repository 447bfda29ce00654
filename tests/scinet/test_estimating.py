"""The estimates are held against files that were written, samples that wait and tensors that were allocated."""

from __future__ import annotations

import gc
import io
import tracemalloc
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from scinet import config, estimating
from scinet.assembling import num_regions
from scinet.data.card import CARD_NAME, DataCard
from scinet.data.stream import Order, SampleStream
from scinet.errors import ConfigError
from scinet.estimating import DataSize
from scinet.fusion.confidence import Fusion
from scinet.fusion.thresholds import DynamicThresholds
from tests.scinet.conftest import RawSample, build_samples

CLASSES, SAMPLES, SHARD_SAMPLES = 60, 600, 64


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> DataCard:
    """Noise images of several sizes, fully labelled, three positives each."""
    generator = np.random.default_rng(0)

    def samples() -> list[RawSample]:
        made = []
        for number in range(SAMPLES):
            buffer = io.BytesIO()
            side = int(generator.integers(20, 60))
            Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "JPEG")
            positives = tuple(sorted(generator.choice(CLASSES, 3, replace=False).tolist()))
            negatives = tuple(label for label in range(CLASSES) if label not in positives)
            made.append(RawSample(f"image-{number:06d}.jpg", buffer.getvalue(), "jpg", positives, negatives, "train"))
        return made

    return build_samples(
        samples(),
        tmp_path_factory.mktemp("estimate") / "data",
        name="data",
        class_names=[f"class name {c:05d}" for c in range(CLASSES)],
        source={},
        holdout=0.0,
        shard_samples=SHARD_SAMPLES,
    )


@pytest.fixture(scope="module")
def data(card: DataCard) -> DataSize:
    """What a user would type about that data set."""
    images = [len(sample.image) for sample in SampleStream(card, "train", Order(0, 0, 1, 0))]
    return DataSize(SAMPLES, CLASSES, 3, CLASSES - 3, float(np.mean(images)), SHARD_SAMPLES)


def _bytes(needs: list[estimating.Need], word: str) -> float:
    return next(need.num_bytes for need in needs if word in need.what)


def test_disk_is_that_of_a_real_build(card: DataCard, data: DataSize) -> None:
    needs = estimating.disk(data)
    stored = sum(shard.num_bytes for shard in card.split("train").shards)
    assert needs[0].num_bytes == pytest.approx(stored, rel=0.05)
    assert needs[0].what.startswith(f"{len(card.split('train').shards)} shards")
    assert needs[1].num_bytes == pytest.approx((card.directory / CARD_NAME).stat().st_size, rel=0.05)


def test_sizes_of_a_card_are_those_of_its_data(card: DataCard, data: DataSize) -> None:
    found = estimating.of_card(card)
    assert (found.num_samples, found.num_classes) == (SAMPLES, CLASSES)
    assert (found.positives_an_image, found.negatives_an_image) == (3, CLASSES - 3)
    assert found.image_bytes == pytest.approx(data.image_bytes, rel=0.1)


def test_windows_are_as_large_as_the_samples_that_wait_in_them(card: DataCard, data: DataSize) -> None:
    options = config.load(None, ["data.lanes=4", "data.shuffle_window=100", "train.global_batch_size=4"])
    stream = iter(SampleStream(card, "train", Order(0, 0, 4, 100)))
    list(islice(stream, 4))  # what is loaded and cached at the first sample is no window
    del stream
    gc.collect()
    tracemalloc.start()
    stream = iter(SampleStream(card, "train", Order(0, 0, 4, 100)))
    for _ in islice(stream, 160):  # a window is read as far as its samples are asked for, and soon full
        pass
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del stream
    assert _bytes(estimating.reading(data, options, 1), "windows") == pytest.approx(held, rel=0.25)


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("fusion.region_evidence=true", "fusion.region_bank_size=70", "model.head=prompt_regions"),
        ("fusion.weights=fixed",),
        ("fusion.weights=fixed", "fusion.combine=linear"),
    ],
    ids=["fitted", "regions", "pool", "linear"],
)
def test_state_is_that_of_real_tensors(data: DataSize, changes: tuple[str, ...]) -> None:
    options = config.load(None, ["fusion.bank_size=100", "loss.threshold_window=50", *changes])
    fusion = Fusion(
        options.fusion,
        options.correlation,
        torch.eye(CLASSES),
        width=32,
        num_regions=num_regions(options),
        num_samples=SAMPLES,
        samples_per_epoch=SAMPLES,
    )
    real = {key: tensor.nbytes for key, tensor in fusion.state_dict().items()}
    needs = estimating.state(data, options, 32, 1)
    parts = {"memory": "memory", "bank": "bank", "Pearson": "correlation"}
    for word, prefix in (parts | {"regions of": "regions.", "together": "counts"}).items():
        named = sum(need.num_bytes for need in needs if word in need.what)
        assert named == sum(size for key, size in real.items() if key.startswith(prefix))
    assert _bytes(needs, "memory") == SAMPLES * CLASSES * 4
    thresholds = DynamicThresholds(CLASSES, hard_k=5, window=50, device=torch.device("cpu"))
    assert _bytes(needs, "thresholds") == sum(tensor.nbytes for tensor in thresholds.state_dict().values())


def test_kept_by_scpnet_is_its_window_and_a_relation_that_no_checkpoint_holds(data: DataSize) -> None:
    options = config.load(None, ["method=scpnet", "loss.threshold_window=50"])
    thresholds = DynamicThresholds(CLASSES, hard_k=5, window=50, device=torch.device("cpu"))
    relation, window = estimating.state(data, options, 32, 1)
    assert (relation.num_bytes, relation.is_saved) == (4 * CLASSES**2, False)
    assert (window.num_bytes, window.is_saved) == (sum(x.nbytes for x in thresholds.state_dict().values()), True)


def test_memory_is_refused_where_training_would_refuse_it(data: DataSize) -> None:
    large = DataSize(1_000_000, 9605, 3, 5, 100_000, 256)
    options = config.load(None)
    text = estimating.report(large, options, 512, 8)
    assert "Training would be refused" in text
    assert "fusion.memory=none fusion.momentum=0" in text
    allowed = config.load(None, ["fusion.memory=none", "fusion.momentum=0"])
    assert "refused" not in estimating.report(large, allowed, 512, 8)
    assert "refused" not in estimating.report(data, options, 512, 1)


def test_more_ranks_share_the_lanes_and_the_batch(data: DataSize) -> None:
    options = config.load(None, ["data.lanes=16"])
    one, eight = (sum(need.num_bytes for need in estimating.reading(data, options, ranks)) for ranks in (1, 8))
    assert eight == pytest.approx(one / 8)
    # three ranks share 16 lanes badly: each opens all of them
    three = estimating.reading(data, config.load(None, ["train.global_batch_size=126"]), 3)
    assert "16 lanes" in three[0].what


def test_baseline_has_no_fusion_to_keep(data: DataSize) -> None:
    assert estimating.state(data, config.load(None, ["method=bce"]), 512, 1) == []


def test_labels_are_refused_when_an_image_has_more_than_there_are_classes() -> None:
    with pytest.raises(ConfigError, match="more than --classes 5"):
        DataSize(10, 5, 3, 3, 1000, 128)
