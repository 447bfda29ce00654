"""Samples out of a tar that a stranger may have made: a closed list of members, bounded sizes, nothing executed.

Headers are read one by one instead of through ``tarfile``, whose streams decompress, believe any size and read every
member: here a member that is not wanted is skipped unread, by seeking where the source can.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from webdataset.tariterators import base_plus_ext, group_by_keys

IMAGE_EXTENSIONS = ("jpg", "png", "webp")
_READ_EXTENSIONS = (*IMAGE_EXTENSIONS, "json")
_BLOCK = 512
_LARGEST_EXTENDED_HEADER = 64 * 2**10
_LARGEST_JSON = 16 * 2**20
_LONGEST_NAME = 4096
_MOST_MEMBERS = 64
_META = re.compile(r"__[^/]*__($|/)")


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


@dataclass(frozen=True)
class Refused:
    """Stands where a member's bytes would be, and says why they were not read."""

    reason: str


def samples(stream: Stream, url: str, numbers: Sequence[int], *, largest_member: int) -> Iterator[dict[str, Any]]:
    """Yield the samples of a tar with the given numbers, as webdataset groups them by key.

    Args:
        stream: at the tar's first byte.
        url: kept with each sample as ``__url__``.
        numbers: places within the tar, ascending.
        largest_member: bytes; a larger member is refused, not read.

    Yields:
        Extension to content or :class:`Refused`; only images and ``json`` have a content.

    Raises:
        tarfile.TarError: if the tar is damaged; one that ends early just yields fewer.
        ValueError: if one name occurs twice in a sample.
    """
    samples: Iterator[dict[str, Any]] = group_by_keys(_members(stream, url, numbers, largest_member))
    return samples


def _members(stream: Stream, url: str, numbers: Sequence[int], largest_member: int) -> Iterator[dict[str, Any]]:
    """Yield the members of the wanted samples; after each sample an empty dictionary, which ends its group."""
    tar = _Tar(stream)
    wanted = iter(numbers)
    next_wanted = next(wanted, None)
    number, key, members = -1, "", 0
    while next_wanted is not None and (member := tar.next()) is not None:
        if not member.is_regular or len(member.name) > _LONGEST_NAME or _META.match(member.name):
            continue
        prefix, extension = base_plus_ext(member.name)
        if prefix is None:
            continue
        if prefix != key:
            if number == next_wanted:
                yield {}
                next_wanted = next(wanted, None)
            number, key, members = number + 1, prefix, 0
        if number == next_wanted:
            members += 1
            if members > _MOST_MEMBERS:
                raise tarfile.ReadError(f"sample '{printable(key)}' has more than {_MOST_MEMBERS} members")
            data = _content(tar, member, extension.lower(), largest_member)
            yield {"fname": member.name, "data": data, "__url__": url}


def _content(tar: _Tar, member: _Member, extension: str, largest: int) -> bytes | Refused:
    if extension not in _READ_EXTENSIONS:
        return Refused("it is none of the files that a sample is made of")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return Refused("its name leads out of the shard")
    if member.size > largest:
        return Refused(f"it has {member.size} bytes, more than data.max_member_mb={largest / 2**20:g} allows")
    if extension == "json" and member.size > _LARGEST_JSON:
        return Refused(f"it has {member.size} bytes, more than the {_LARGEST_JSON} that labels can take")
    return tar.content(member)


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    is_regular: bool


class _Tar:
    """The headers of an uncompressed tar, one after the other."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._ahead = 0  # bytes up to the next header

    def next(self) -> _Member | None:
        """Return the next member, or None at the end."""
        given: dict[str, str] = {}
        while True:
            if self._ahead:
                self._stream.skip(self._ahead)
                self._ahead = 0
            block = self._stream.read(_BLOCK)
            if not block or not any(block):
                return None
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if info.size < 0:
                raise tarfile.ReadError(f"a member of {info.size} bytes")
            if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                given |= _pax(self._extended(info.size))
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                given["path"] = self._extended(info.size).rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
                self._extended(info.size)
            else:
                return self._member(info, given)

    def _member(self, info: tarfile.TarInfo, given: dict[str, str]) -> _Member:
        size = int(given.get("size", info.size))
        if size < 0:
            raise tarfile.ReadError(f"a member of {size} bytes")
        # links, folders and devices have no content whatever their header says; sparse files are expanded by no one
        has_content = info.type not in (*_WITHOUT_CONTENT, tarfile.DIRTYPE)
        self._ahead = _padded(size) if has_content else 0
        is_sparse = any(key.startswith("GNU.sparse") for key in given)
        is_regular = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not is_sparse
        return _Member(given.get("path", info.name), size, is_regular)

    def content(self, member: _Member) -> bytes:
        """Return the bytes of the member that was returned last."""
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


_WITHOUT_CONTENT = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


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


def printable(text: str) -> str:
    """Return a stranger's text fit for a one-line message."""
    shown = text if text.isprintable() else text.encode("unicode_escape", "backslashreplace").decode("ascii")
    return shown if len(shown) <= 200 else f"{shown[:200]}..."
