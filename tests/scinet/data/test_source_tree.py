"""Archives of strangers are read where they lie: odd names reach nothing, bombs are refused, damage is named."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from scinet.data import archives, source_tree
from scinet.data.archives import Archive, read_source
from scinet.data.images import BrokenImageError
from scinet.data.records import ImageSource
from scinet.data.source_tree import SourceTree
from scinet.errors import ConfigError, DataError

MEMBERS = {
    "a/one.txt": b"1" * 700,
    "./b/two.txt": b"",
    "b\\three.txt": b"3",
    "ü/图.txt": "é".encode(),
    "x" * 150: b"long",
}


def _zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return path


def _tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as packed:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return path


PACKERS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "all.zip": _zip,
    "stored.zip": lambda path, members: _zip(path, members, zipfile.ZIP_STORED),
    "all.tar": _tar,
    "all.tar.gz": lambda path, members: _tar(path, members, "w:gz"),
    "all.tgz": lambda path, members: _tar(path, members, "w:gz"),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


def _tree(root: Path) -> SourceTree:
    return SourceTree(root, root.parent / "scratch")


@pytest.mark.parametrize("name", PACKERS)
def test_members_come_back_when_they_lie_in_an_archive(root: Path, name: str) -> None:
    PACKERS[name](root / name, MEMBERS)
    tree = _tree(root)
    for member, content in MEMBERS.items():
        source = tree.find(member.replace("\\", "/").removeprefix("./"))
        assert source is not None
        assert read_source(source) == content
    assert tree.find("a/none.txt") is None
    assert [path.name for path in root.iterdir()] == [name]


def test_plain_file_comes_first_and_then_the_archives_by_name(root: Path) -> None:
    _zip(root / "b.zip", {"x.txt": b"from b", "y.txt": b"from b"})
    _tar(root / "a.tar", {"x.txt": b"from a", "z.txt": b"first"})
    with tarfile.open(root / "a.tar", "a") as packed:
        info = tarfile.TarInfo("z.txt")
        info.size = 4
        packed.addfile(info, io.BytesIO(b"last"))
    (root / "y.txt").write_bytes(b"plain")
    found = {name: _tree(root).find(f"{name}.txt") for name in "xyz"}
    assert {name: read_source(source) for name, source in found.items() if source} == {
        "x": b"from a",
        "y": b"plain",
        "z": b"last",
    }


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/passwd", "a/../../secret.txt", "", "a\0b", ".."])
def test_nothing_outside_the_source_is_found_when_a_list_names_it(root: Path, name: str) -> None:
    (root.parent / "secret.txt").write_text("mine")
    assert _tree(root).find(name) is None


def test_odd_members_are_passed_over_when_they_are_no_files(root: Path) -> None:
    with tarfile.open(root / "odd.tar", "w") as packed:
        kinds = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "fifo": tarfile.FIFOTYPE, "dir": tarfile.DIRTYPE}
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            packed.addfile(info)
        for name in ("../../climbs.txt", "/etc/absolute.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            packed.addfile(info, io.BytesIO(b"x"))
    tree = _tree(root)
    assert [tree.find(name) for name in ("link", "hard", "fifo", "dir", "../../climbs.txt")] == [None] * 5
    assert not list(root.parent.glob("**/climbs.txt"))


def test_bomb_is_refused_when_a_zip_promises_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_BOMB_BYTES", 10_000)
    _zip(root / "bomb.zip", {"bomb.jpg": bytes(5_000_000)})
    source = _tree(root).find("bomb.jpg")
    assert source is not None
    with pytest.raises(BrokenImageError, match=r"bomb.zip: bomb.jpg says it unpacks \d+ bytes to 5000000: a bomb"):
        read_source(source)


def test_member_gives_no_more_than_it_declares_when_it_lies(root: Path) -> None:
    _zip(root / "liar.zip", {"a.jpg": bytes(1_000_000)})
    content = (root / "liar.zip").read_bytes()
    # the table of contents is what counts: let it promise a hundred bytes
    place = content.rindex(b"PK\x01\x02") + 24
    (root / "liar.zip").write_bytes(content[:place] + struct.pack("<I", 100) + content[place + 4 :])
    source = _tree(root).find("a.jpg")
    assert source is not None
    with pytest.raises(BrokenImageError, match="its checksum is not the one in the archive"):
        read_source(source)
    honest = source._replace(crc=zlib.crc32(bytes(100)))
    assert len(read_source(honest)) == 100


def test_member_is_refused_when_one_bit_of_it_has_changed(root: Path) -> None:
    with zipfile.ZipFile(root / "a.zip", "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a.jpg", bytes(1000))
    content = bytearray((root / "a.zip").read_bytes())
    content[500] ^= 4
    (root / "a.zip").write_bytes(content)
    source = _tree(root).find("a.jpg")
    assert source is not None
    with pytest.raises(BrokenImageError, match=r"a.zip: a.jpg is damaged: its checksum"):
        read_source(source)


def test_image_is_refused_when_it_is_larger_than_any(root: Path) -> None:
    source = ImageSource(str(root / "none.jpg"), size=archives.MAX_IMAGE_BYTES + 1)
    with pytest.raises(BrokenImageError, match="more than the"):
        read_source(source)


def test_member_is_named_when_its_bytes_are_damaged(root: Path) -> None:
    _zip(root / "a.zip", {"a.jpg": bytes(range(256)) * 50})
    source = _tree(root).find("a.jpg")
    assert source is not None
    content = bytearray((root / "a.zip").read_bytes())
    content[40:60] = b"\xff" * 20
    (root / "a.zip").write_bytes(content)
    with pytest.raises(BrokenImageError, match=r"a.zip: a.jpg is damaged"):
        read_source(source)


def test_member_is_named_when_it_is_encrypted_or_packed_strangely(root: Path) -> None:
    _zip(root / "a.zip", {"a.jpg": b"abc"}, zipfile.ZIP_LZMA)
    source = _tree(root).find("a.jpg")
    assert source is not None
    with pytest.raises(BrokenImageError, match=r"a.jpg is packed in a way that is not supported"):
        read_source(source)


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
@pytest.mark.parametrize("damage", ["text", "cut"])
def test_archive_is_named_when_it_was_downloaded_in_part(root: Path, name: str, damage: str) -> None:
    packer = {"a.zip": _zip, "a.tar": _tar, "a.tar.gz": lambda path, members: _tar(path, members, "w:gz")}[name]
    packer(root / name, {"a.jpg": bytes(range(256)) * 100})  # type: ignore[operator]
    content = (root / name).read_bytes()
    (root / name).write_bytes(b"<html>not found</html>" if damage == "text" else content[: len(content) // 2])
    with pytest.raises(DataError, match=r"archive .*a\.(zip|tar|tar\.gz|tar-.*) cannot be read: .*download it again"):
        _tree(root).find("a.jpg")
    assert not list(root.parent.glob("scratch/*.part"))


def test_compressed_tar_is_refused_when_it_is_a_bomb(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_tree, "_MIN_BOMB_BYTES", 2**20)
    (root / "a.tar.gz").write_bytes(gzip.compress(bytes(20_000_000)))
    with pytest.raises(DataError, match=r"a.tar.gz unpacks its \d+ bytes to more than \d+: a decompression bomb"):
        _tree(root).find("a.jpg")


def test_compressed_tar_is_refused_when_the_disk_has_no_room(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tar(root / "a.tar.gz", MEMBERS, "w:gz")
    monkeypatch.setattr(source_tree.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 3}))
    with pytest.raises(DataError, match=r"a.tar.gz must be unpacked .* where 3 are free"):
        _tree(root).find("a.jpg")


def test_lines_are_read_when_the_text_is_compressed_or_has_a_mark(root: Path) -> None:
    text = "\ufeffone\r\ntwo\n\nthree"
    (root / "a.csv.gz").write_bytes(gzip.compress(text.encode()))
    _zip(root / "b.zip", {"b.csv": text.encode(), "c.csv.gz": gzip.compress(text.encode())})
    tree = _tree(root)
    for name in ("a.csv.gz", "b.csv", "c.csv.gz"):
        assert list(tree.lines(tree.require("a list", name))) == ["one", "two", "", "three"]


@pytest.mark.parametrize("content", [b"\xe9\n", gzip.compress(b"a\n" * 999)[:-9]], ids=["latin-1", "cut-off"])
def test_text_is_named_when_it_cannot_be_read(root: Path, content: bytes) -> None:
    name = "a.csv.gz" if content.startswith(b"\x1f\x8b") else "a.csv"
    (root / name).write_bytes(content)
    tree = _tree(root)
    with pytest.raises(DataError, match=rf"{name} cannot be read as a text in UTF-8"):
        list(tree.lines(tree.require("a list", name)))


def test_line_is_refused_when_it_never_ends(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_tree, "_MAX_LINE", 1000)
    (root / "a.csv.gz").write_bytes(gzip.compress(b"a" * 100_000))
    tree = _tree(root)
    with pytest.raises(DataError, match="a line of more than 1000 characters"):
        list(tree.lines(tree.require("a list", "a.csv.gz")))


def test_nearest_name_is_suggested_in_the_deepest_folder_that_exists(root: Path) -> None:
    (root / "ImageList").mkdir()
    (root / "ImageList/TrainImageList.txt").write_text("")
    with pytest.raises(DataError) as caught:
        _tree(root).require("the list", "ImageList/TrainImagelist.txt", "TrainImagelist.txt", archive="ImageList.zip")
    for words in ("the list is missing", "expected ImageList/TrainImagelist.txt, there or in ImageList.zip"):
        assert words in str(caught.value)
    assert "did you mean 'TrainImageList.txt'" in str(caught.value)


def test_folder_is_suggested_when_the_source_does_not_exist(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"source folder .*rwa does not exist; did you mean '.*raw'"):
        _tree(root.with_name("rwa"))


def test_index_is_small_when_an_archive_is_large(root: Path) -> None:
    _tar(root / "a.tar", {f"train_0/{number:016x}.jpg": b"x" for number in range(3000)})
    archive = Archive(root / "a.tar")
    assert len(archive) == 3000
    assert sum(column.itemsize for column in archive._columns) == 37
