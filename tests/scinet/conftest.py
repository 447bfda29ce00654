"""Small builders that the tests share."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scinet.data import shards
from scinet.data.card import DataCard
from scinet.data.shards import RawSample

MakeImage = Callable[..., bytes]
MakeSamples = Callable[..., list[RawSample]]
MakeShards = Callable[..., DataCard]
CLASSES = ("cat", "dog", "owl")


@pytest.fixture(scope="session")
def make_image() -> MakeImage:
    """``make_image(seed, kind, size)``: the bytes of a small noise image."""

    def make(seed: int = 0, kind: str = "PNG", size: int = 8) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def make_samples(make_image: MakeImage) -> MakeSamples:
    """``make_samples(n, split, ids)``: samples of three classes, every other one a JPEG, each class known in most."""

    def make(num_samples: int, split: str = "train", ids: Sequence[str] | None = None) -> list[RawSample]:
        made = []
        for number in range(num_samples):
            kind, extension = (("PNG", "png"), ("JPEG", "jpg"))[number % 2]
            name = f"{split}-{number:04d}" if ids is None else ids[number]
            positives, negatives = (number % 3,), ((number + 1) % 3,)
            made.append(RawSample(name, make_image(number, kind), extension, positives, negatives, split))
        return made

    return make


@pytest.fixture(scope="session")
def make_shards(tmp_path_factory: pytest.TempPathFactory, make_samples: MakeSamples) -> MakeShards:
    """``make_shards(n, shard_samples, samples, holdout, out)``: a folder of shards and its card."""
    numbers = count()

    def make(
        num_samples: int = 12,
        shard_samples: int = 5,
        samples: Iterable[RawSample] | None = None,
        holdout: float = 0.0,
        out: Path | None = None,
    ) -> DataCard:
        return shards.build(
            make_samples(num_samples) if samples is None else samples,
            out or tmp_path_factory.mktemp("shards") / str(next(numbers)),
            name="tiny",
            class_names=list(CLASSES),
            source={"name": "test"},
            holdout=holdout,
            shard_samples=shard_samples,
        )

    return make
