"""A build is whole or absent, and what was put in comes out."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scinet.data.building import BuildOptions, build
from scinet.data.card import CARD_NAME, DataCard
from scinet.data.stream import Order, SampleStream, StoredSample
from scinet.errors import BuildInterrupted, ConfigError, DataError
from tests.scinet.conftest import MakeImage, MakeSamples, MakeShards, RawSample, collect

ODD_IDS = [
    "a.b.c",
    "dir/sub/a.jpg",
    "../up",
    ".hidden",
    "ü ñ 図",
    "100%",
    "%2E",
    "a\\b",
    "_x_",
    "__y__",
    "x" * 230,
    "Ä" * 30,
]


def _stored(card: DataCard, split: str = "train") -> list[StoredSample]:
    return list(SampleStream(card, split, Order(0, 0, 1, 0)))


def _assert_same(stored: list[StoredSample], samples: list[RawSample]) -> None:
    assert [s.sample_id for s in stored] == [s.sample_id for s in samples]
    for mine, theirs in zip(stored, samples, strict=True):
        assert mine.image == theirs.image
        assert tuple(np.flatnonzero(mine.truth == 1)) == tuple(sorted(theirs.positives))
        assert tuple(np.flatnonzero(mine.truth == -1)) == tuple(sorted(theirs.negatives))


def test_samples_come_back_as_they_were_when_read(make_samples: MakeSamples, make_shards: MakeShards) -> None:
    samples = make_samples(13)
    card = make_shards(samples=samples, shard_samples=5)
    stored = _stored(card)
    _assert_same(stored, samples)
    assert [s.index for s in stored] == list(range(13))
    assert [shard.num_samples for shard in card.split("train").shards] == [5, 5, 3]


def test_samples_come_back_when_ids_hold_dots_slashes_and_other_scripts(
    make_samples: MakeSamples, make_shards: MakeShards
) -> None:
    samples = make_samples(len(ODD_IDS), ids=ODD_IDS)
    card = make_shards(samples=samples)
    _assert_same(_stored(card), samples)
    for path in card.shard_paths("train"):
        with tarfile.open(path) as tar:
            assert all("/" not in name and name.count(".") == 1 for name in tar.getnames())


@settings(deadline=None, max_examples=20)
@given(
    ids=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), min_size=1, max_size=6, unique=True)
)
def test_samples_come_back_when_ids_are_any_text(
    make_samples: MakeSamples, make_shards: MakeShards, ids: list[str]
) -> None:
    samples = make_samples(len(ids), ids=ids)
    _assert_same(_stored(make_shards(samples=samples, shard_samples=2)), samples)


def test_card_counts_what_is_there_when_written(make_samples: MakeSamples, make_shards: MakeShards) -> None:
    samples = make_samples(7) + make_samples(3, "test")
    card = make_shards(samples=samples, shard_samples=4)
    assert (card.name, card.class_names, card.num_classes) == ("tiny", ("cat", "dog", "owl"), 3)
    assert {name: split.num_samples for name, split in card.splits.items()} == {"train": 7, "test": 3}
    assert card.split("train").num_positives == (3, 2, 2)
    assert card.split("train").num_negatives == (2, 3, 2)
    assert card.split("train").label_density == pytest.approx(0.5)
    for split in card.splits.values():
        for shard in split.shards:
            content = (card.directory / shard.file).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.num_bytes, shard.sha256)
    assert [s.index for s in _stored(card, "test")] == [7, 8, 9]


def test_bytes_are_identical_when_the_samples_are(make_samples: MakeSamples, make_shards: MakeShards) -> None:
    first, second = (make_shards(samples=make_samples(9), holdout=0.3) for _ in range(2))
    names = sorted(path.name for path in first.directory.iterdir())
    assert names == sorted(path.name for path in second.directory.iterdir())
    for name in names:
        assert (first.directory / name).read_bytes() == (second.directory / name).read_bytes()
    assert first.sha256 == second.sha256


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_holdout_takes_its_share_of_the_training_samples_only(
    share: float, make_shards: MakeShards, make_image: MakeImage
) -> None:
    image = make_image(size=1)
    samples = [
        RawSample(f"{split}/{n}", image, "png", (0,), (), split)
        for split, m in (("train", 1500), ("test", 100))
        for n in range(m)
    ]
    card = make_shards(samples=samples, holdout=share, shard_samples=2000)
    sizes = {name: split.num_samples for name, split in card.splits.items()}
    assert sizes["test"] == 100
    assert sizes["train"] + sizes.get("holdout", 0) == 1500
    assert abs(sizes.get("holdout", 0) - 1500 * share) <= 4.5 * np.sqrt(1500 * share * (1 - share))


def test_holdout_keeps_its_members_when_other_samples_come_and_go(
    make_samples: MakeSamples, make_shards: MakeShards
) -> None:
    samples = make_samples(60)
    whole = make_shards(samples=samples, holdout=0.3)
    part = make_shards(samples=samples[::-2], holdout=0.3)
    kept = {s.sample_id for s in samples[::-2]}
    assert {s.sample_id for s in _stored(part, "holdout")} == {s.sample_id for s in _stored(whole, "holdout")} & kept


def test_build_is_refused_and_the_folder_untouched_when_it_is_not_empty(
    tmp_path: Path, make_shards: MakeShards
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        make_shards(out=out)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious.txt"]
    assert (out / "precious.txt").read_text() == "mine"


def test_build_is_refused_when_out_is_a_file(tmp_path: Path, make_shards: MakeShards) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="--out"):
        make_shards(out=out)
    assert out.read_text() == "mine"


def test_build_is_refused_when_the_parent_is_a_file(tmp_path: Path, make_shards: MakeShards) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        make_shards(out=tmp_path / "file" / "out")


def test_build_fills_the_folder_when_it_is_empty(tmp_path: Path, make_shards: MakeShards) -> None:
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    assert make_shards(3, out=out).split("train").num_samples == 3
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / CARD_NAME).is_file()


def test_build_is_refused_when_an_id_comes_twice(
    tmp_path: Path, make_samples: MakeSamples, make_shards: MakeShards
) -> None:
    with pytest.raises(DataError, match=r"'a\.b' occurs twice"):
        make_shards(samples=make_samples(3, ids=["a.b", "c", "a.b"]), out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_build_is_refused_when_no_sample_comes(tmp_path: Path, make_shards: MakeShards) -> None:
    with pytest.raises(DataError, match="no sample"):
        make_shards(samples=[], out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (DataError("bad list"), DataError),
        (KeyboardInterrupt(), BuildInterrupted),
        (RuntimeError("ours"), RuntimeError),
    ],
)
def test_nothing_is_left_behind_when_the_source_fails_half_way(
    tmp_path: Path, make_samples: MakeSamples, make_shards: MakeShards, error: BaseException, seen: type[BaseException]
) -> None:
    def source() -> Iterator[RawSample]:
        yield from make_samples(7)
        raise error

    with pytest.raises(seen):
        make_shards(samples=source(), shard_samples=3, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_behind_when_the_disk_is_full(
    tmp_path: Path, make_samples: MakeSamples, make_shards: MakeShards
) -> None:
    def source() -> Iterator[RawSample]:
        yield from make_samples(4)
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="No space left on device"):
        make_shards(samples=source(), shard_samples=3, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_default_holdout_is_a_tenth_when_not_given(tmp_path: Path, make_image: MakeImage) -> None:
    samples = [RawSample(str(n), make_image(size=1), "png", (), (), "train") for n in range(600)]
    collection = collect(samples, tmp_path)
    card = build(lambda _: collection, tmp_path / "out", BuildOptions(), lambda *_: None)
    assert 30 < card.split("holdout").num_samples < 95
