"""A data card that does not fit its folder is refused before anything is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scinet.data import card
from scinet.errors import ConfigError, DataError
from tests.scinet.conftest import MakeShards


@pytest.fixture
def folder(tmp_path: Path, make_shards: MakeShards) -> Path:
    return make_shards(7, shard_samples=4, out=tmp_path / "scenes").directory


def _edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / card.CARD_NAME
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def test_card_is_equal_when_read_twice(folder: Path) -> None:
    assert card.read(folder) == card.read(folder)


def test_checksum_differs_when_the_card_does(folder: Path) -> None:
    before = card.read(folder).sha256
    _edit(folder, lambda tree: tree.update(name="other"))
    assert card.read(folder).sha256 != before


def test_folder_and_command_are_named_when_it_is_missing(folder: Path) -> None:
    missing = folder.parent / "scene"
    with pytest.raises(ConfigError) as caught:
        card.read(missing, prepare="scinet data build scenes --out x")
    message = str(caught.value)
    assert f"{missing} does not exist" in message
    assert "`scinet data build scenes --out x`" in message
    assert f"did you mean '{folder}'" in message
    assert caught.value.exit_status == 2


def test_folder_is_named_when_even_its_parent_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist") as caught:
        card.read(tmp_path / "a" / "b", prepare="do it")
    assert "`do it`" in str(caught.value)


def test_command_is_named_when_the_folder_has_no_card(folder: Path) -> None:
    (folder / card.CARD_NAME).unlink()
    with pytest.raises(ConfigError, match=r"holds no dataset\.json.*`do it`") as caught:
        card.read(folder, prepare="do it")
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    "content", ["", "not json", "[]", "3", "{}", '{"splits": 3}', '{"splits": {"train": []}}', "\udcff", "null"]
)
def test_card_is_refused_when_it_is_not_one(folder: Path, content: str) -> None:
    (folder / card.CARD_NAME).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"dataset\.json is not a data card.*`do it`") as caught:
        card.read(folder, prepare="do it")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["name", "class_names", "splits", "source"])
def test_card_is_refused_when_a_part_is_missing(folder: Path, key: str) -> None:
    _edit(folder, lambda tree: tree.pop(key))
    with pytest.raises(DataError, match=key):
        card.read(folder)


def test_shard_is_named_when_missing(folder: Path) -> None:
    (folder / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar is missing.*3 samples"):
        card.read(folder)


@pytest.mark.parametrize("change", [-1, 1, -512])
def test_shard_is_named_when_its_size_is_wrong(folder: Path, change: int) -> None:
    shard = folder / "train-000000.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:change] if change < 0 else content + b"x" * change)
    with pytest.raises(DataError, match=rf"train-000000\.tar has {len(content) + change} bytes.*says {len(content)}"):
        card.read(folder)


@pytest.mark.parametrize("name", ["../train-000000.tar", "sub/x.tar", "/etc/passwd", "..", "", "pipe:cat x/y"])
def test_shard_is_refused_when_its_name_holds_a_path(folder: Path, name: str) -> None:
    (folder.parent / "train-000000.tar").write_bytes((folder / "train-000000.tar").read_bytes())
    _edit(folder, lambda tree: tree["splits"]["train"]["shards"][0].update(file=name))
    with pytest.raises(DataError, match=r"plain file name|missing|name of 0 letters"):
        card.read(folder)


def test_card_is_refused_when_the_counts_are_of_other_classes(folder: Path) -> None:
    _edit(folder, lambda tree: tree["class_names"].append("fourth"))
    with pytest.raises(DataError, match="'train' counts 3 classes, the card names 4"):
        card.read(folder)


def _set(*keys: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def edit(tree: Any) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = to

    return edit


_TRAIN = ("splits", "train")
_SHARD = (*_TRAIN, "shards", 0)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_set("format", to="scinet-shards-99"), "format 'scinet-shards-99', expected 'scinet-shards-1'"),
        (_set("class_names", to=[]), "no class or no split"),
        (_set("splits", to={}), "no class or no split"),
        (_set("num_indices", to=6), "6 indices are too few for its 7 samples"),
        (_set("num_indices", to=-1), "-1 where a count should be"),
        (_set(*_TRAIN, "num_samples", to=6), "split 'train' has 6 samples, its shards 7 in all"),
        (_set(*_TRAIN, "num_samples", to=2**70), "where a count should be"),
        (_set(*_TRAIN, "num_samples", to=float("inf")), "inf where a count should be"),
        (_set(*_TRAIN, "num_positives", 0, to=-3), "-3 where a count should be"),
        (_set(*_TRAIN, "num_negatives", to=[1]), "'train' counts 1 classes, the card names 3"),
        (_set(*_SHARD, "num_samples", to=10**12), "1000000000000 samples in a shard of"),
        (_set(*_SHARD, "num_samples", to=True), "True where a count should be"),
        (_set(*_SHARD, "file", to="x" * 5000), "a shard's name of 5000 letters"),
        (_set(*_SHARD, "file", to="\x1b[31m.tar"), "a shard's name of 9 letters, expected up to 255 that print"),
    ],
)
def test_card_is_refused_when_its_counts_cannot_be(
    folder: Path, edit: Callable[[dict[str, Any]], None], words: str
) -> None:
    _edit(folder, edit)
    with pytest.raises(DataError, match=words):
        card.read(folder)


def test_splits_are_listed_when_one_is_asked_for_that_is_not_there(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no samples in split 'test'; it has train \(7\)"):
        card.read(folder).split("test")


def test_density_is_zero_when_nothing_is_labelled() -> None:
    assert card.Split(1, (0,), (0,), ()).label_density == 0.0


def test_counts_are_read_again_when_written(folder: Path) -> None:
    read = card.read(folder)
    assert read.num_indices == 7
    assert read.missing == card.Missing()
    pairs = read.split("train").cooccurrence
    assert pairs is not None
    assert (pairs.num_pairs, pairs.is_whole) == (0, True)


def test_card_is_read_when_it_is_of_the_first_kind(folder: Path) -> None:
    def age(tree: dict[str, Any]) -> None:
        del tree["num_indices"], tree["missing"]
        for split in tree["splits"].values():
            del split["cooccurrence"]

    _edit(folder, age)
    read = card.read(folder)
    assert (read.num_indices, read.missing.count) == (7, 0)
    assert read.split("train").cooccurrence is None


def test_class_names_stay_as_they_are_when_they_look_like_numbers(tmp_path: Path) -> None:
    names = ["[ 1,  2 ]", "[\n1\n]", "  3"]
    split = card.Split(0, (0, 0, 0), (0, 0, 0), ())
    card.write(
        tmp_path,
        name="n",
        class_names=names,
        splits={"train": split},
        source={},
        num_indices=0,
        missing=card.Missing(),
    )
    assert list(card.read(tmp_path).class_names) == names
