"""Samples out of a tar that a stranger may have made: a closed list of members, bounded sizes, nothing executed."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from webdataset.tariterators import base_plus_ext, group_by_keys

from scinet.data.images import IMAGE_FORMATS
from scinet.data.labels import LARGEST_JSON
from scinet.data.tar_headers import Member, Stream, Tar
from scinet.errors import DataError
from scinet.texttable import printable

IMAGE_EXTENSIONS = tuple(IMAGE_FORMATS)
_READ_EXTENSIONS = (*IMAGE_EXTENSIONS, "json")
_LONGEST_NAME = 4096
_MOST_MEMBERS = 64
_META = re.compile(r"__[^/]*__($|/)")


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
    wanted = iter(numbers)
    next_wanted = next(wanted, None)
    tar, number, key = Tar(stream), -1, ""
    extensions: list[str] = []  # of the sample that is being read
    try:
        while next_wanted is not None and (found := _next_named(tar)) is not None:
            member, prefix, extension = found
            if prefix != key:
                if number == next_wanted:
                    yield {}
                    next_wanted = next(wanted, None)
                number, key, extensions = number + 1, prefix, []
            if number == next_wanted:
                if len(extensions) == _MOST_MEMBERS:
                    raise tarfile.ReadError(f"sample '{printable(key)}' has more than {_MOST_MEMBERS} members")
                yield {"fname": member.name, "data": _content(tar, member, extension, largest_member), "__url__": url}
                extensions.append(extension)
    except (tarfile.TarError, OSError, ValueError, DataError):
        if "json" in extensions and not set(extensions).isdisjoint(IMAGE_EXTENSIONS):
            yield {}  # the damage comes after a whole sample
        raise


def _next_named(tar: Tar) -> tuple[Member, str, str] | None:
    """Return the next member that can belong to a sample, its key and its extension, or None at the end."""
    while (member := tar.next()) is not None:
        if member.is_regular and len(member.name) <= _LONGEST_NAME and not _META.match(member.name):
            key, extension = base_plus_ext(member.name)
            if key is not None:
                return member, key, extension.lower()
    return None


def _content(tar: Tar, member: Member, extension: str, largest: int) -> bytes | Refused:
    if extension not in _READ_EXTENSIONS:
        return Refused("it is none of the files that a sample is made of")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return Refused("its name leads out of the shard")
    if member.size > largest:
        return Refused(f"it has {member.size} bytes, more than data.max_member_mb={largest / 2**20:g} allows")
    if extension == "json" and member.size > LARGEST_JSON:
        return Refused(f"it has {member.size} bytes, more than the {LARGEST_JSON} that labels can take")
    return tar.content(member)
