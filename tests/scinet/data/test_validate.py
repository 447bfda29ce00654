"""Every fault that can lie in a folder of shards is planted here, found under its own name, and ends nothing early."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scinet.data.building import BuildOptions, build
from scinet.data.card import CARD_NAME, DataCard
from scinet.data.findings import ERROR, KINDS, NUM_EXAMPLES, WARNING, Findings
from scinet.data.members import IMAGE_FORMATS
from scinet.data.stream import IMAGE_EXTENSIONS
from scinet.data.validate import validate
from scinet.errors import ConfigError, DataError
from tests.scinet.conftest import MakeImage, MakeSamples, MakeShards, RawSample, collect

Members = list[tuple[str, bytes]]
SHARD = "train-000000.tar"


def _check(directory: Path, jobs: int = 1) -> Findings:
    return validate(directory, jobs=jobs, progress=lambda *_: None)[1]


@pytest.fixture
def folder(make_samples: MakeSamples, make_shards: MakeShards) -> Path:
    """Nine training samples in two shards, three of the test split; nothing is wrong."""
    samples = [*make_samples(9), *make_samples(12, "test")[9:]]
    return make_shards(samples=samples, shard_samples=5).directory


def _members(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def _store(path: Path, members: Members) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    _adopt(path)


def _adopt(path: Path) -> None:
    """Let the card say the size and checksum that the file has now, so that only what is inside is wrong."""
    content = path.read_bytes()

    def edit(card: Any) -> None:
        for split in card["splits"].values():
            for shard in split["shards"]:
                if shard["file"] == path.name:
                    shard |= {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    _edit_card(path.parent, edit)


def _edit_card(folder: Path, edit: Callable[[Any], None]) -> None:
    card = json.loads((folder / CARD_NAME).read_text())
    edit(card)
    (folder / CARD_NAME).write_text(json.dumps(card))


def _edit_labels(folder: Path, place: int = 0, shard: str = SHARD, **changes: Any) -> None:
    """Change keys of the n-th sample's json; None takes the key away."""
    members = _members(folder / shard)
    number = [n for n, (name, _) in enumerate(members) if name.endswith(".json")][place]
    tree = json.loads(members[number][1]) | changes
    members[number] = (members[number][0], json.dumps({k: v for k, v in tree.items() if v is not None}).encode())
    _store(folder / shard, members)


def _edit_image(folder: Path, content: bytes, place: int = 0, shard: str = SHARD) -> None:
    members = _members(folder / shard)
    number = [n for n, (name, _) in enumerate(members) if not name.endswith(".json")][place]
    members[number] = (members[number][0], content)
    _store(folder / shard, members)


def _image(folder: Path, place: int = 0, shard: str = SHARD) -> bytes:
    return [content for name, content in _members(folder / shard) if not name.endswith(".json")][place]


def _reorder(folder: Path, edit: Callable[[Members], Members]) -> None:
    _store(folder / SHARD, edit(_members(folder / SHARD)))


def test_nothing_is_found_when_nothing_is_wrong(folder: Path) -> None:
    assert _check(folder).counts == {}


def test_nothing_is_found_when_broken_images_were_left_out(make_samples: MakeSamples, tmp_path: Path) -> None:
    samples = make_samples(7)
    samples[2] = dataclasses.replace(samples[2], image=b"no image")
    collection = collect(samples, tmp_path)
    options = BuildOptions(holdout=0, shard_samples=3, skip_missing=True)
    card = build(lambda _: collection, tmp_path / "out", options, lambda *_: None)
    assert (card.num_indices, card.split("train").num_samples) == (7, 6)
    assert _check(card.directory).counts == {}


def test_image_members_are_those_that_training_reads() -> None:
    assert tuple(IMAGE_FORMATS) == IMAGE_EXTENSIONS


PLANTED: dict[str, tuple[Callable[[Path], Any], dict[str, int]]] = {
    "json of another kind": (
        lambda folder: _edit_labels(folder, positives="cat"),
        {"labels-malformed": 1, "card-counts": 3},
    ),
    "json without index": (
        lambda folder: _edit_labels(folder, index=None),
        {"labels-malformed": 1, "card-counts": 3},
    ),
    "boolean class": (
        lambda folder: _edit_labels(folder, positives=[True]),
        {"labels-malformed": 1, "card-counts": 3},
    ),
    "index of 200 digits": (
        lambda folder: _edit_labels(folder, index=10**199),
        {"labels-malformed": 1, "card-counts": 3},
    ),
    "class out of range": (lambda folder: _edit_labels(folder, positives=[0, 3]), {"class-range": 1}),
    "negative class": (lambda folder: _edit_labels(folder, negatives=[1, -1]), {"class-range": 1}),
    "class positive and negative": (
        lambda folder: _edit_labels(folder, negatives=[0, 1]),
        {"class-both": 1, "card-counts": 1},
    ),
    "class listed twice": (
        lambda folder: _edit_labels(folder, positives=[0, 0]),
        {"class-repeated": 1, "card-counts": 1},
    ),
    "nothing known": (
        lambda folder: _edit_labels(folder, positives=[], negatives=[]),
        {"row-empty": 1, "card-counts": 2},
    ),
    "negatives only": (
        lambda folder: _edit_labels(folder, positives=[]),
        {"row-without-positive": 1, "card-counts": 1},
    ),
    "id twice": (lambda folder: _edit_labels(folder, id="train-0001"), {"id-repeated": 1}),
    "index twice": (lambda folder: _edit_labels(folder, index=1), {"index-repeated": 1}),
    "index too high": (lambda folder: _edit_labels(folder, index=12), {"index-range": 1}),
    "image broken": (lambda folder: _edit_image(folder, b"<html>not found</html>"), {"image-broken": 1}),
    "image cut off": (lambda folder: _edit_image(folder, _image(folder)[:-30]), {"image-broken": 1}),
    "image repeated": (lambda folder: _edit_image(folder, _image(folder, 2)), {"image-repeated": 1}),
    "image of the test split in train": (
        lambda folder: _edit_image(folder, _image(folder, 1, "test-000000.tar")),
        {"image-leak": 1},
    ),
    "member that is no part of a sample": (
        lambda folder: _reorder(folder, lambda members: [("code.pyd", b"x"), *members]),
        {"member-foreign": 1},
    ),
    "member in a folder": (
        lambda folder: _reorder(folder, lambda members: [("../a.json", b"{}"), *members]),
        {"member-foreign": 1},
    ),
    "member twice": (
        lambda folder: _reorder(folder, lambda members: [members[0], *members]),
        {"member-twice": 1},
    ),
    "second image": (
        lambda folder: _reorder(folder, lambda members: [("train-0000.webp", b"x"), *members]),
        {"sample-incomplete": 1, "image-broken": 1},
    ),
    "no image": (
        lambda folder: _reorder(folder, lambda members: [members[0], *members[2:]]),
        {"sample-incomplete": 1},
    ),
    "no json": (
        lambda folder: _reorder(folder, lambda members: members[1:]),
        {"sample-incomplete": 1, "card-counts": 3},
    ),
    "parts of a sample apart": (
        lambda folder: _reorder(folder, lambda members: [*members[1:], members[0]]),
        {"sample-incomplete": 2, "shard-samples": 1},
    ),
    "sample missing": (
        lambda folder: _reorder(folder, lambda members: members[2:]),
        {"shard-samples": 1, "card-counts": 3},
    ),
    "shard missing": (
        lambda folder: (folder / "train-000001.tar").unlink(),
        {"shard-missing": 1, "card-counts": 7},
    ),
    "tar beside the card": (lambda folder: (folder / "old.tar").write_bytes(b""), {"shard-unlisted": 1}),
    "class name twice": (
        lambda folder: _edit_card(folder, lambda card: card.update(class_names=["cat", "cat", "owl"])),
        {"card-classes": 1},
    ),
    "class more than the card counts": (
        lambda folder: _edit_card(folder, lambda card: card["class_names"].append("yak")),
        {"card-counts": 4, "class-unseen": 1},
    ),
    "wrong count of a class": (
        lambda folder: _edit_card(folder, lambda card: card["splits"]["train"].update(num_positives=[3, 4, 3])),
        {"card-counts": 1},
    ),
    "shard of another folder": (
        lambda folder: _edit_card(folder, lambda card: card["splits"]["test"]["shards"][0].update(file="../x.tar")),
        {"shard-name": 1, "card-counts": 7, "shard-unlisted": 1},
    ),
    "split of another name": (
        lambda folder: _edit_card(folder, lambda card: card["splits"].update(val=card["splits"].pop("test"))),
        {"split-name": 1},
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_found_under_its_name(folder: Path, fault: str) -> None:
    plant, expected = PLANTED[fault]
    plant(folder)
    found = _check(folder)
    assert found.counts == expected, found.examples
    assert all(found.examples[kind] and set(found.examples) <= set(KINDS) for kind in expected)


def test_flipped_byte_is_found_when_the_tar_still_reads(folder: Path) -> None:
    content = bytearray((folder / SHARD).read_bytes())
    content[-1] ^= 1
    (folder / SHARD).write_bytes(content)
    assert _check(folder).counts == {"shard-checksum": 1}


def test_truncated_tar_is_found_and_its_whole_samples_are_still_counted(folder: Path) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:2800])
    found = _check(folder)
    assert set(found.counts) == {"shard-size", "shard-checksum", "shard-damaged", "shard-samples", "card-counts"}
    assert found.examples["shard-damaged"][0].startswith(f"{SHARD} after sample 1")
    assert "samples of train: 5, card 9" in found.examples["card-counts"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_member_is_refused_when_it_is_no_plain_file(folder: Path, kind: bytes) -> None:
    with tarfile.open(folder / SHARD, "a") as tar:
        member = tarfile.TarInfo("train-0009.jpg")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    _adopt(folder / SHARD)
    assert _check(folder).counts == {"member-foreign": 1}


def test_member_is_refused_when_it_claims_more_than_the_shard_holds(folder: Path) -> None:
    content = (folder / SHARD).read_bytes()
    member = tarfile.TarInfo("train-0000.jpg")
    member.size = 2**40
    (folder / SHARD).write_bytes(member.tobuf() + content)
    _adopt(folder / SHARD)
    found = _check(folder).counts
    assert found["member-foreign"] == 1
    assert found["shard-samples"] == 1


def test_image_is_refused_when_its_format_is_none_of_the_list(folder: Path, make_image: MakeImage) -> None:
    _edit_image(folder, make_image(77, "BMP"))
    found = _check(folder)
    assert found.counts == {"image-broken": 1}
    assert "BMP is none of JPEG, PNG, WEBP" in found.examples["image-broken"][0]


def test_image_is_only_a_warning_when_its_extension_is_another(folder: Path, make_image: MakeImage) -> None:
    _edit_image(folder, make_image(77, "WEBP"))
    found = _check(folder)
    assert found.counts == {"image-extension": 1}
    assert (found.total(ERROR), found.total(WARNING)) == (0, 1)


def test_image_is_a_jpeg_when_further_pictures_follow_it(folder: Path) -> None:
    from PIL import Image

    buffer = io.BytesIO()
    pictures = [Image.new("RGB", (9, 7), (shade, 0, 0)) for shade in (10, 200)]
    pictures[0].save(buffer, "MPO", save_all=True, append_images=pictures[1:])
    # every other sample of the folder is a JPEG
    _edit_image(folder, buffer.getvalue(), place=1)
    assert _check(folder).counts == {}


def test_image_is_repeated_when_only_its_metadata_differs(folder: Path) -> None:
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(io.BytesIO(_image(folder, 2))) as image:
        image.save(buffer, "PNG", compress_level=1)
    assert buffer.getvalue() != _image(folder, 2)
    _edit_image(folder, buffer.getvalue())
    found = _check(folder)
    assert found.counts == {"image-repeated": 1}
    assert found.examples["image-repeated"] == [f"train-0000 (train, {SHARD}) = train-0002 (train, {SHARD})"]


def test_image_in_train_and_holdout_is_a_warning_when_test_is_clean(
    make_samples: MakeSamples, make_shards: MakeShards
) -> None:
    samples = make_samples(40)
    card = make_shards(samples=samples, holdout=0.3, shard_samples=50)
    kept = {json.loads(content)["id"] for name, content in _members(card.directory / SHARD) if name.endswith("json")}
    inside = next(n for n, s in enumerate(samples) if s.sample_id in kept)
    outside = next(n for n, s in enumerate(samples) if s.sample_id not in kept)
    s = samples[inside]
    samples[inside] = RawSample(s.sample_id, samples[outside].image, s.extension, s.positives, s.negatives, s.split)
    again = make_shards(samples=samples, holdout=0.3, shard_samples=50)
    found = _check(again.directory).counts
    assert found.pop("image-extension", 0) in (0, 1)
    assert found == {"image-in-two-splits": 1}


def test_all_faults_are_found_together_and_few_are_named(folder: Path) -> None:
    for place in range(5):
        _edit_labels(folder, place, positives=[9], id="same")
    _edit_image(folder, b"no image")
    (folder / "train-000001.tar").write_bytes(b"no tar" * 200)
    found = _check(folder)
    assert found.counts["class-range"] == 5
    assert len(found.examples["class-range"]) == NUM_EXAMPLES
    assert found.counts["id-repeated"] == 1
    assert found.examples["id-repeated"][0].endswith("and 3 more")
    assert {"image-broken", "shard-damaged", "shard-size", "shard-checksum"} <= set(found.counts)


@pytest.mark.multiprocess
def test_processes_find_the_same_as_one(folder: Path) -> None:
    _edit_labels(folder, 1, positives=[9])
    _edit_image(folder, b"no image", shard="train-000001.tar")
    one, two = _check(folder, jobs=1), _check(folder, jobs=2)
    assert (one.counts, one.examples) == (two.counts, two.examples)


def test_card_is_asked_for_when_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        _check(tmp_path / "nowhere")
    (tmp_path / CARD_NAME).write_text("{")
    with pytest.raises(DataError, match="is not a data card"):
        _check(tmp_path)


def test_nothing_is_read_twice_when_no_shard_can_be_opened(make_shards: MakeShards) -> None:
    card: DataCard = make_shards(3)
    for path in card.directory.glob("*.tar"):
        path.unlink()
    assert set(_check(card.directory).counts) == {"shard-missing", "card-counts", "class-unseen"}
