"""What a source format tells the builder: a collection, and its records one after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from scinet.errors import ConfigError, nearest

Progress = Callable[[str, int, int], None]


class ImageSource(NamedTuple):
    """Where the bytes of a file lie: in a file of their own, or inside a zip or tar archive.

    Args:
        path: the file or the archive.
        member: the name inside the archive, only to be shown: it comes from strangers and is never used as a path.
        offset: where the bytes begin in ``path``; in a zip, where the member's local header begins.
        stored: bytes taken there.
        size: bytes of the file itself.
        packing: empty where the bytes lie as they are, else how a zip holds them: ``stored``, ``deflated``, or the name
            of something that cannot be read.
        changed: when ``path`` was last changed, nanoseconds; what a build has made of another state is made again.
        crc: of the file itself, where a zip tells it.
    """

    path: str
    member: str = ""
    offset: int = 0
    stored: int = 0
    size: int = 0
    packing: str = ""
    changed: int = 0
    crc: int = 0

    def __str__(self) -> str:
        """Return the words by which a user knows it."""
        return f"{self.path}: {self.member}" if self.member else self.path


def file_source(path: str, status: os.stat_result) -> ImageSource:
    """Return a file of its own as a source."""
    return ImageSource(path, "", 0, status.st_size, status.st_size, "", status.st_mtime_ns)


class Record(NamedTuple):
    """One image as its collection lists it.

    Args:
        sample_id: unique in the collection.
        image: where it is; None if it was not found.
        expected: where it should be, for the list of missing images.
        positives: class indices known to be present.
        negatives: class indices known to be absent.
        split: train, holdout or test.
    """

    sample_id: str
    image: ImageSource | None
    expected: str
    positives: tuple[int, ...]
    negatives: tuple[int, ...]
    split: str


@dataclass(frozen=True)
class Collection:
    """A collection before it is written.

    Args:
        name: of the data set; empty takes that of the target.
        class_names: C names.
        source: version, licence, traps and options, for the card; counts known only after all records were seen may be
            added while they are.
        records: begins a pass over the records, in the order they are stored; the same in every pass.
        num_records: how many will come, for the progress bar; 0 if that is not known.
        load: returns an image's bytes in any process, so it must pickle.
        holdout: share of the training images to set aside unless the user says; 0 where the collection has its own.
    """

    name: str
    class_names: list[str]
    source: dict[str, Any]
    records: Callable[[], Iterator[Record]]
    num_records: int
    load: Callable[[ImageSource], bytes]
    holdout: float = 0.1


def check_folder(path: Path, what: str) -> None:
    """Refuse a folder of the user's that is not there.

    Raises:
        ConfigError: naming it and the nearest spelling.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{what} {path} is a file, expected a folder")
    if not path.is_dir():
        beside = [str(found) for found in path.parent.glob("*")] if path.parent.is_dir() else []
        raise ConfigError(f"{what} {path} does not exist{nearest(str(path), beside)}")
