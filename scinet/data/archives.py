"""Reading members of zip and tar archives where they lie: nothing is extracted, no member's name becomes a path."""

from __future__ import annotations

import array
import io
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from scinet.data.images import BrokenImageError
from scinet.data.masks import text_key
from scinet.data.records import ImageSource
from scinet.errors import DataError

MAX_IMAGE_BYTES = 256 * 2**20
_BOMB_BYTES, _BOMB_RATIO = 64 * 2**20, 200  # larger than this and packed tighter than this is no honest file
_ZIP_HEADER = struct.Struct("<4s22xHH")  # the local header: signature ... length of the name, length of the extras
_PACKINGS = ("", "stored", "deflated", "encrypted", "packed in a way that is not supported")


class Archive:
    """The index of one archive: 37 bytes a member, so that an archive of millions of images fits."""

    def __init__(self, path: Path) -> None:
        """Read the table of contents.

        Raises:
            DataError: if it is no archive, or a damaged one.
        """
        self.path = path
        self._columns = [array.array(code) for code in "QqqqBI"]
        try:
            self._changed = path.stat().st_mtime_ns
            if zipfile.is_zipfile(path):
                self._index_zip()
            else:
                self._index_tar()
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
            raise DataError(
                f"archive {path} cannot be read: {error}; download it again, or move it out of the source folder"
            ) from error
        except OSError as error:
            raise DataError(f"archive {path} cannot be read: {error.strerror or error}") from error
        keys = np.frombuffer(self._columns[0], dtype=np.uint64) if self._columns[0] else np.zeros(0, np.uint64)
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def _index_zip(self) -> None:
        with zipfile.ZipFile(self.path) as archive:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                packing = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 2}.get(info.compress_type, 4)
                packing = 3 if info.flag_bits & 1 else packing
                self._add(info.filename, info.header_offset, info.compress_size, info.file_size, packing, info.CRC)

    def _index_tar(self) -> None:
        with tarfile.open(self.path, "r:") as archive:
            for info in archive:
                if info.isreg() and not info.issparse():
                    self._add(info.name, info.offset_data, info.size, info.size, 0, 0)
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
        length = self.path.stat().st_size
        ends = np.array(self._columns[1]) + np.array(self._columns[2])
        if len(ends) and int(ends.max()) > length:
            raise ValueError(f"it ends after {length} bytes, inside a member")

    def _add(self, name: str, *values: int) -> None:
        for column, value in zip(self._columns, (text_key(_plain(name)), *values), strict=True):
            column.append(value)

    def __len__(self) -> int:
        """Return the number of files inside."""
        return len(self._sorted)

    def find(self, member: str) -> ImageSource | None:
        """Return where a member lies; of several of one name the last counts, as when unpacking."""
        place = int(np.searchsorted(self._sorted, np.uint64(text_key(member)), side="right")) - 1
        if place < 0 or int(self._sorted[place]) != text_key(member):
            return None
        offset, stored, size, packing, crc = (column[self._order[place]] for column in self._columns[1:])
        return ImageSource(str(self.path), member, offset, stored, size, _PACKINGS[packing], self._changed, crc)


def _plain(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")


class _Member(io.RawIOBase):
    """The bytes of one member, inflated on the way; never more of them than the archive declared."""

    def __init__(self, source: ImageSource) -> None:
        if source.packing not in ("", "stored", "deflated"):
            raise BrokenImageError(f"{source} is {source.packing}")
        if source.size > max(_BOMB_BYTES, _BOMB_RATIO * max(source.stored, 1)):
            raise BrokenImageError(f"{source} says it unpacks {source.stored} bytes to {source.size}: a bomb")
        self._source = source
        self._file: BinaryIO = open(source.path, "rb")  # noqa: SIM115 - closed by close()
        self._file.seek(source.offset)
        if source.packing:
            header = self._file.read(_ZIP_HEADER.size)
            if len(header) < _ZIP_HEADER.size or header[:4] != b"PK\x03\x04":
                raise BrokenImageError(f"{source} has no header where the archive's table of contents says")
            self._file.seek(sum(_ZIP_HEADER.unpack(header)[1:]), io.SEEK_CUR)
        self._inflate = zlib.decompressobj(-15) if source.packing == "deflated" else None
        self._stored_left, self._left, self._crc = source.stored, source.size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        wanted = min(len(view), self._left)
        if not wanted:
            return 0
        content = self._read_stored(wanted) if self._inflate is None else self._read_deflated(wanted)
        if not content:
            raise BrokenImageError(f"{self._source} ends {self._left} bytes early: the archive is damaged")
        view[: len(content)] = content
        self._left -= len(content)
        self._crc = zlib.crc32(content, self._crc)
        if self._source.packing and not self._left and self._crc != self._source.crc:
            raise BrokenImageError(f"{self._source} is damaged: its checksum is not the one in the archive")
        return len(content)

    def _read_stored(self, wanted: int) -> bytes:
        content = self._file.read(min(wanted, self._stored_left))
        self._stored_left -= len(content)
        return content

    def _read_deflated(self, wanted: int) -> bytes:
        assert self._inflate is not None
        try:
            while True:
                packed = self._inflate.unconsumed_tail or self._read_stored(2**16)
                content = self._inflate.decompress(packed, wanted)
                if content or not packed or self._inflate.eof:
                    return content
        except zlib.error as error:
            raise BrokenImageError(f"{self._source} is damaged: {error}") from error

    def close(self) -> None:
        self._file.close()
        super().close()


def open_member(source: ImageSource) -> io.BufferedReader:
    """Open a file, or a member of an archive, for reading as bytes.

    Raises:
        BrokenImageError: if it is packed in a way that cannot be read, or is a decompression bomb.
        DataError: if the file it lies in cannot be opened.
    """
    try:
        return io.BufferedReader(_Member(source), 2**16)
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}") from error


def read_source(source: ImageSource) -> bytes:
    """Return the bytes of an image.

    Raises:
        BrokenImageError: if it is damaged or too large for an image.
        DataError: if the disk does not give it.
    """
    if source.size > MAX_IMAGE_BYTES:
        raise BrokenImageError(f"{source} has {source.size} bytes, more than the {MAX_IMAGE_BYTES} of any image")
    try:
        with open_member(source) as member:
            return member.read()
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}") from error
