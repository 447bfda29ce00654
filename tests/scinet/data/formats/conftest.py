"""What the tests of the raw layouts share: writing trees, packing them, building them."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from scinet.data.building import BuildOptions, build
from scinet.data.card import DataCard
from scinet.data.records import Collection
from scinet.data.stream import Order, SampleStream
from tests.scinet.conftest import MakeImage

Truth = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
Write = Callable[[Path, Mapping[str, str | int]], Path]
Build = Callable[..., DataCard]


@pytest.fixture
def write(make_image: MakeImage) -> Write:
    """``write(root, {"a/b.txt": "text", "c.jpg": 3})``: make a tree; a number is the seed of an image."""

    def make(root: Path, files: Mapping[str, str | int]) -> Path:
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                path.write_text(content, encoding="utf-8")
            else:
                path.write_bytes(make_image(content, "JPEG"))
        return root

    return make


@pytest.fixture
def build_from(tmp_path: Path) -> Build:
    """``build_from(collect, skip=False)``: write what ``collect(scratch, skip)`` returns, without a hold-out."""

    def make(
        collect: Callable[[Path, bool], Collection],
        *,
        skip: bool = False,
        holdout: float | None = 0.0,
        name: str = "out",
    ) -> DataCard:
        options = BuildOptions(holdout=holdout, shard_samples=3, skip_missing=skip)
        return build(lambda scratch: collect(scratch, skip), tmp_path / name, options, lambda *_: None)

    return make


def truth(card: DataCard, split: str) -> Truth:
    """The names of the known positives and negatives of each sample of a split."""
    names = card.class_names
    return {
        sample.sample_id: (
            tuple(name for name, sign in zip(names, sample.truth, strict=True) if sign > 0),
            tuple(name for name, sign in zip(names, sample.truth, strict=True) if sign < 0),
        )
        for sample in SampleStream(card, split, Order(0, 0, 1, 0))
    }


def pack(root: Path, archive: str, *parts: str) -> None:
    """Move parts of a tree into an archive of that name beside them."""
    path = root / archive
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for part in parts:
                for file in sorted((root / part).rglob("*")) or [root / part]:
                    packed.write(file, file.relative_to(root))
    else:
        with tarfile.open(path, "w:gz" if path.suffix in (".tgz", ".gz") else "w") as tar:
            for part in parts:
                tar.add(root / part, part)
    for part in parts:
        shutil.rmtree(root / part) if (root / part).is_dir() else (root / part).unlink()


def same_shards(first: DataCard, second: DataCard) -> bool:
    """Whether two builds hold the same bytes."""
    return [(s.file, s.sha256) for split in first.splits.values() for s in split.shards] == [
        (s.file, s.sha256) for split in second.splits.values() for s in split.shards
    ]
