"""Small builders that the tests share."""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scinet.data.archives import read_source
from scinet.data.building import BuildOptions, build
from scinet.data.card import DataCard
from scinet.data.records import Collection, ImageSource, Record

CLASSES = ("cat", "dog", "owl")


@dataclass(frozen=True)
class RawSample:
    """A sample as a test thinks it up."""

    sample_id: str
    image: bytes
    extension: str
    positives: tuple[int, ...]
    negatives: tuple[int, ...]
    split: str


MakeImage = Callable[..., bytes]
MakeSamples = Callable[..., list[RawSample]]
MakeShards = Callable[..., DataCard]


def collect(samples: Iterable[RawSample], folder: Path) -> Collection:
    """A collection of samples, whose images are written to a folder while the records are read."""

    def records() -> Iterator[Record]:
        for number, sample in enumerate(samples):
            path = folder / f"{number}.{sample.extension}"
            path.write_bytes(sample.image)
            size = len(sample.image)
            source = ImageSource(str(path), "", 0, size, size)
            yield Record(sample.sample_id, source, str(path), sample.positives, sample.negatives, sample.split)

    return Collection("tiny", list(CLASSES), {"name": "test"}, records, 0, read_source)


def build_samples(
    samples: Iterable[RawSample],
    out: Path,
    *,
    class_names: Sequence[str] = CLASSES,
    name: str = "tiny",
    source: dict[str, Any] | None = None,
    holdout: float = 0.0,
    shard_samples: int = 5,
) -> DataCard:
    """Shards of samples that a test thought up."""
    with tempfile.TemporaryDirectory() as folder:
        collection = replace(
            collect(samples, Path(folder)),
            name=name,
            class_names=list(class_names),
            source={"name": "test"} if source is None else source,
        )
        options = BuildOptions(holdout=holdout, shard_samples=shard_samples)
        return build(lambda _: collection, out, options, lambda *_: None)


def spoil(card: DataCard, *sample_ids: str) -> DataCard:
    """Overwrite the images of these samples where they lie, since the builder would refuse what cannot be decoded."""
    wanted = set(sample_ids)
    for split in card.splits:
        for path in card.shard_paths(split):
            with tarfile.open(path) as tar, path.open("r+b") as file:
                for member in tar:
                    name, _, extension = member.name.partition(".")
                    if name in wanted and extension != "json":
                        file.seek(member.offset_data)
                        file.write(bytes(member.size))
                        wanted.remove(name)
    assert not wanted, wanted
    return card


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
        return build_samples(
            make_samples(num_samples) if samples is None else samples,
            out or tmp_path_factory.mktemp("shards") / str(next(numbers)),
            holdout=holdout,
            shard_samples=shard_samples,
        )

    return make
