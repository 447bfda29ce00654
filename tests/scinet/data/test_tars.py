"""A shard built to attack the reader is refused in one sentence; nothing of it is expanded, followed or executed."""

from __future__ import annotations

import io
import json
import logging
import pickle
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scinet.data.card import DataCard
from scinet.data.stream import BadSample, Order, SampleStream, StoredSample
from scinet.data.views import SHARD_FORMATS, decode
from scinet.errors import DataError
from scinet.options import DataOptions, OnBadSample
from tests.scinet.conftest import MakeShards

pytestmark = pytest.mark.timeout(60)

WRITTEN = Order(0, 0, lanes=1, shuffle_window=0)
STOP = DataOptions(retries=0, max_member_mb=1)
SKIP = replace(STOP, on_bad_sample=OnBadSample.skip)

Member = tuple[tarfile.TarInfo, bytes]


def _file(name: str, content: bytes = b"", **fields: Any) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def _labels(name: str = "odd", index: int = 9) -> bytes:
    return json.dumps({"id": name, "index": index, "positives": [0], "negatives": []}).encode()


@pytest.fixture
def attack(make_shards: MakeShards) -> Callable[..., DataCard]:
    """``attack(members)``: a shard of four samples, the members, and two samples; the card counts one more sample."""

    def make(*members: Member, format: int = tarfile.PAX_FORMAT, counts: int = 1) -> DataCard:
        card = make_shards(6, shard_samples=6)
        path = card.shard_paths("train")[0]
        with tarfile.open(path) as tar:
            own = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
        with tarfile.open(path, "w", format=format) as tar:
            for info, content in [*own[:8], *members, *own[8:]]:
                tar.addfile(info, io.BytesIO(content))
        split = card.split("train")
        shard = replace(split.shards[0], num_samples=6 + counts)
        train = replace(split, num_samples=6 + counts, shards=(shard,))
        return replace(card, splits={"train": train}, num_indices=10)

    return make


def _decoded(sample: StoredSample) -> str:
    decode(sample.image, sample.where, formats=SHARD_FORMATS)
    return sample.sample_id


def _ids(card: DataCard, options: DataOptions) -> list[str]:
    stream = SampleStream(card, "train", WRITTEN, transform=_decoded, options=options)
    return ["bad" if isinstance(item, BadSample) else item for item in stream]


NAMES = [f"train-{n:04d}" for n in range(6)]


def _bomb() -> bytes:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"\0" * 99) + chunk(b"IEND", b"")


def _other_format(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    return buffer.getvalue()


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('unpickled')",)


ONE_BAD = {
    "no image": [_file("odd.jpg", b"no image at all"), _file("odd.json", _labels())],
    "empty image": [_file("odd.jpg"), _file("odd.json", _labels())],
    "bomb": [_file("odd.png", _bomb()), _file("odd.json", _labels())],
    "another format": [_file("odd.jpg", _other_format("EPS")), _file("odd.json", _labels())],
    "bitmap": [_file("odd.png", _other_format("BMP")), _file("odd.json", _labels())],
    "pickle": [_file("odd.pkl", pickle.dumps(_Evil())), _file("odd.json", _labels())],
    "pickle alone": [_file("odd.pyd", pickle.dumps(_Evil()))],
    "absolute name": [_file("/etc/odd.jpg", b"x"), _file("/etc/odd.json", _labels())],
    "name out of the folder": [_file("../odd.jpg", b"x"), _file("../odd.json", _labels())],
    "large member": [_file("odd.jpg", bytes(2**20 + 1)), _file("odd.json", _labels())],
    "large labels": [_file("odd.jpg", b"x"), _file("odd.json", b" " * (2**20 + 1))],
    "deep labels": [_file("odd.jpg", b"x"), _file("odd.json", b"[" * 100_000)],
    "control characters": [_file("o\x1b[2J\nd.jpg", b"x"), _file("o\x1b[2J\nd.json", _labels())],
    "link for an image": [_file("odd.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), _file("odd.json", _labels())],
    "device for an image": [_file("odd.jpg", type=tarfile.CHRTYPE), _file("odd.json", _labels())],
    "index": [_file("odd.jpg", b"x"), _file("odd.json", _labels(index=2**70))],
}


@pytest.mark.parametrize("kind", ONE_BAD)
def test_sample_is_named_or_skipped_when_it_is_an_attack(attack: Callable[..., DataCard], kind: str) -> None:
    card = attack(*ONE_BAD[kind])
    with pytest.raises(DataError) as caught:
        _ids(card, STOP)
    message = str(caught.value)
    assert str(card.shard_paths("train")[0]) in message
    assert "d'" in message, "the sample is named"
    assert message.isprintable()
    assert len(message) < 600
    assert _ids(card, SKIP) == [*NAMES[:4], "bad", *NAMES[4:]]


@pytest.mark.parametrize(
    "members",
    [
        [_file("folder", type=tarfile.DIRTYPE)],
        [_file("link.jpg", type=tarfile.LNKTYPE, linkname="train-0000.png")],
        [_file("pipe.jpg", type=tarfile.FIFOTYPE)],
        [_file("disk.jpg", type=tarfile.BLKTYPE)],
        [_file("__meta__/a.json", b"{}")],
        [_file("no-extension", b"x")],
        [_file(".hidden", b"x")],
        [_file("a/" * 3000 + "long.jpg", b"x")],
    ],
)
def test_member_is_passed_over_when_it_is_none_of_a_sample(
    attack: Callable[..., DataCard], members: list[Member]
) -> None:
    assert _ids(attack(*members, counts=0), STOP) == NAMES


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_name_is_read_in_either_format(attack: Callable[..., DataCard], format: int, make_image: Any) -> None:
    name = "é" * 120
    members = _file(f"{name}.png", make_image(1)), _file(f"{name}.json", _labels("long"))
    assert _ids(attack(*members, format=format), STOP) == [*NAMES[:4], "long", *NAMES[4:]]


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info, _ = _file(name, type=kind)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "tail",
    [
        _header("odd.jpg", 2**60) + b"x",
        _header("odd.jpg", 2**86) + b"x",
        _header("odd.txt", 2**62) + b"x",
        _header("long", 2**40, tarfile.GNUTYPE_LONGNAME),
        _header("pax", 2**40, tarfile.XHDTYPE),
        _header("pax", 20, tarfile.XHDTYPE) + b"9999999 path=abc\n".ljust(512, b"\0"),
        _header("pax", 20, tarfile.XHDTYPE) + b"17 size=-99999999\n".ljust(512, b"\0") + _header("odd.jpg", 1),
        _header("pax", 20, tarfile.XHDTYPE) + b"nothing at all".ljust(512, b"\0"),
        b"\xff" * 512,
        b"x" * 100,
    ],
)
def test_shard_is_named_within_little_memory_when_its_headers_lie(make_shards: MakeShards, tail: bytes) -> None:
    card = make_shards(6, shard_samples=6)
    path = card.shard_paths("train")[0]
    with tarfile.open(path) as tar:
        end = tar.getmembers()[8].offset  # the fifth sample
    path.write_bytes(path.read_bytes()[:end] + tail)
    tracemalloc.start()
    with pytest.raises(DataError) as caught:
        _ids(card, STOP)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20
    assert str(path) in str(caught.value)
    assert _ids(card, SKIP) == [*NAMES[:4], "bad", "bad"]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_shard_is_named_when_it_is_compressed(make_shards: MakeShards, mode: Any) -> None:
    card = make_shards(4, shard_samples=4)
    path = card.shard_paths("train")[0]
    with tarfile.open(path, mode) as tar:
        tar.addfile(*(lambda member: (member[0], io.BytesIO(member[1])))(_file("a.jpg", bytes(10_000))))
    with pytest.raises(DataError, match="damaged"):
        _ids(card, STOP)


def test_sparse_file_is_not_expanded_when_a_header_claims_a_large_one(attack: Callable[..., DataCard]) -> None:
    info, _ = _file("odd.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**50)}
    card = attack((info, b""), _file("odd.json", _labels()))
    assert _ids(card, SKIP) == [*NAMES[:4], "bad", *NAMES[4:]]


@settings(deadline=None, max_examples=60)
@given(place=st.integers(0, 2**13), value=st.integers(0, 255), cut=st.integers(0, 2**14))
def test_reader_gives_samples_or_one_error_when_any_byte_is_changed(
    make_shards: MakeShards, place: int, value: int, cut: int
) -> None:
    card = _shared(make_shards)
    path = card.shard_paths("train")[0]
    whole = path.read_bytes()
    content = bytearray(whole)
    content[place % len(content)] = value
    try:
        path.write_bytes(content[: len(content) - cut % len(content)])
        assert len(_ids(card, SKIP)) == 6
    finally:
        path.write_bytes(whole)


_cards: list[DataCard] = []


def _shared(make_shards: MakeShards) -> DataCard:
    if not _cards:
        _cards.append(make_shards(6, shard_samples=6))
    return _cards[0]


def test_shard_is_read_where_it_vanished_for_a_moment_only(
    make_shards: MakeShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = make_shards(6, shard_samples=3)
    path = card.shard_paths("train")[1]
    hidden = path.rename(tmp_path / "hidden")
    monkeypatch.setattr("scinet.data.sources.time.sleep", lambda _: hidden.rename(path))
    assert _ids(card, replace(STOP, retries=1)) == NAMES


def test_rest_of_the_shard_is_bad_when_it_vanished(make_shards: MakeShards, caplog: Any) -> None:
    caplog.set_level(logging.WARNING)
    card = make_shards(6, shard_samples=3)
    card.shard_paths("train")[1].unlink()
    assert _ids(card, SKIP) == [*NAMES[:3], "bad", "bad", "bad"]
