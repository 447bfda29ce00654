"""The headers of an uncompressed tar that a stranger may have made, one after the other.

Not through ``tarfile``, whose streams decompress, believe any size and read every member: here a member that is not
wanted is skipped unread, by seeking where the source can. Training and ``scinet data validate`` both read through this,
so that they never take a shard for two different things.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from typing import BinaryIO, Protocol

_BLOCK = 512
_LARGEST_EXTENDED_HEADER = 64 * 2**10
# links, folders and devices have no content whatever their header says
_WITHOUT_CONTENT = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
    tarfile.DIRTYPE,
)


class Stream(Protocol):
    """Bytes in sequence."""

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes, fewer only at the end."""
        ...

    def skip(self, size: int) -> None:
        """Pass over bytes; beyond the end the next read returns nothing."""
        ...

    def finish(self) -> None:
        """Check what can be checked once the last sample was read."""
        ...


class LocalStream:
    """A file that is skipped by seeking."""

    def __init__(self, file: BinaryIO) -> None:
        """Begin where the file stands."""
        self._file = file
        self._size = os.fstat(file.fileno()).st_size

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes, fewer only at the end."""
        return self._file.read(min(size, self._size))

    def skip(self, size: int) -> None:
        """Pass over bytes."""
        self._file.seek(min(self._file.tell() + size, self._size))

    def finish(self) -> None:
        """Nothing: `scinet data validate` reads the checksums of local shards."""


@dataclass(frozen=True)
class Member:
    """What a header says: ``is_regular`` tells a plain file from links, folders, devices and sparse files."""

    name: str
    size: int
    is_regular: bool


class Tar:
    """The headers of an uncompressed tar, one after the other."""

    def __init__(self, stream: Stream) -> None:
        """Begin at the first byte of a tar."""
        self._stream = stream
        self._ahead = 0  # bytes up to the next header

    def next(self) -> Member | None:
        """Return the next member, or None at the end; a tar that is cut off between two members ends there.

        Raises:
            tarfile.TarError, ValueError: if a header is damaged.
        """
        given: dict[str, str] = {}
        while True:
            if self._ahead:
                self._stream.skip(self._ahead)
                self._ahead = 0
            block = self._stream.read(_BLOCK)
            if not block or not any(block):
                return None
            name, size, kind = _plain_header(block) or _header(block)
            if size < 0:
                raise tarfile.ReadError(f"a member of {size} bytes")
            if kind in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                given |= _pax(self._extended(size))
            elif kind == tarfile.GNUTYPE_LONGNAME:
                given["path"] = self._extended(size).rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
                self._extended(size)
            else:
                return self._member(name, size, kind, given)

    def _member(self, name: str, size: int, kind: bytes, given: dict[str, str]) -> Member:
        size = int(given.get("size", size))
        if size < 0:
            raise tarfile.ReadError(f"a member of {size} bytes")
        self._ahead = 0 if kind in _WITHOUT_CONTENT else _padded(size)
        # a sparse file of a few bytes can claim terabytes: it is expanded by no one
        is_sparse = any(key.startswith("GNU.sparse") for key in given)
        is_regular = kind in (tarfile.REGTYPE, tarfile.AREGTYPE) and not is_sparse
        return Member(given.get("path", name), size, is_regular)

    def content(self, member: Member) -> bytes:
        """Return the bytes of the member that was returned last.

        Raises:
            tarfile.ReadError: if the tar ends inside.
        """
        content = self._stream.read(member.size)
        if len(content) < member.size:
            raise tarfile.ReadError("unexpected end of data")
        self._ahead -= member.size
        return content

    def _extended(self, size: int) -> bytes:
        if size > _LARGEST_EXTENDED_HEADER:
            raise tarfile.ReadError(f"an extended header of {size} bytes")
        content = self._stream.read(_padded(size))
        if len(content) < size:
            raise tarfile.ReadError("unexpected end of data")
        return content[:size]


def _header(block: bytes) -> tuple[str, int, bytes]:
    """Return name, size and type of a member.

    Raises:
        tarfile.TarError: if it is no header.
    """
    info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    return info.name, info.size, info.type


def _plain_header(block: bytes) -> tuple[str, int, bytes] | None:
    """Return what :func:`_header` would, in less time; None for all but a plain file with a short name.

    Owner, mode and time, which nothing here asks for, are not looked at.
    """
    name, size, checksum = block[:100].partition(b"\0")[0], block[124:135], block[148:154]
    is_plain = block[156:157] == tarfile.REGTYPE and block[345:346] == b"\0" and block[135:136] == b"\0"
    if not is_plain or len(block) != _BLOCK or not _is_octal(size) or not _is_octal(checksum) or name.endswith(b"/"):
        return None
    if block[154:156] != b"\0 " or sum(block) - sum(block[148:156]) + 8 * ord(" ") != int(checksum, 8):
        return None
    return name.decode("utf-8", "surrogateescape"), int(size, 8), tarfile.REGTYPE


def _is_octal(digits: bytes) -> bool:
    return bool(digits) and not digits.strip(b"01234567")


def _pax(content: bytes) -> dict[str, str]:
    """Return the records of an extended header: length, space, key, ``=``, value, newline."""
    found, place = {}, 0
    while place < len(content) and content[place]:
        length, space, _ = content[place : place + 20].partition(b" ")
        end = place + int(length)
        if not space or end <= place or end > len(content):
            raise tarfile.ReadError("an extended header that does not add up")
        key, _, value = content[place + len(length) + 1 : end - 1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        place = end
    return found


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
