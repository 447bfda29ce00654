"""Shards read sample by sample for looking at: strict about what a member may be, and without torch.

Training reads through :mod:`scinet.data.stream`; the tools here read every label and, where asked, every image.
"""

from __future__ import annotations

import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from scinet.data.card import DataCard
from scinet.data.images import IMAGE_FORMATS
from scinet.data.labels import LARGEST_JSON, Labels, check_range, parse_labels
from scinet.data.tar_headers import LocalStream, Tar
from scinet.errors import DataError
from scinet.texttable import printable

LABELS = "json"
_MEMBER = re.compile(rf"([^./]+)\.({'|'.join([*IMAGE_FORMATS, LABELS])})")
_PENDING_A_JOB = 4

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass
class StoredMembers:
    """Members that follow each other under one key; ``problems`` holds (what, name of the member)."""

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)


def stored_members(path: Path, *, with_images: bool) -> Iterator[StoredMembers]:
    """Yield the samples of a tar as the reader groups them, with what is wrong about their members.

    Args:
        path: a shard.
        with_images: read the images too; without, they are skipped in the file and their parts are empty.

    Raises:
        tarfile.TarError, OSError, ValueError: where the tar is damaged.
    """
    largest = path.stat().st_size
    current: StoredMembers | None = None
    with path.open("rb") as file:
        tar = Tar(LocalStream(file))
        while (member := tar.next()) is not None:
            matched = _MEMBER.fullmatch(member.name)
            if matched is None or not member.is_regular or member.size > largest:
                # at once: the tar may end before the sample does
                yield StoredMembers(member.name, problems=[("member-foreign", member.name)])
                continue
            key, extension = matched.groups()
            if current is None or current.key != key:
                if current is not None:
                    yield current
                current = StoredMembers(key)
            if extension == LABELS and member.size > LARGEST_JSON:
                current.problems.append(("labels-large", member.name))
            elif extension in current.parts:
                current.problems.append(("member-twice", member.name))
            else:
                is_read = with_images or extension == LABELS
                current.parts[extension] = tar.content(member) if is_read else b""
    if current is not None:
        yield current


def labels_of(path: Path, num_samples: int) -> Iterator[Labels]:
    """Yield the labels of a shard's samples without reading its images.

    Args:
        path: the shard.
        num_samples: what the card says it holds.

    Raises:
        DataError: if the shard or a sample's labels are damaged, or the number differs.
    """
    found = 0
    try:
        for stored in stored_members(path, with_images=False):
            if not stored.parts:
                continue
            if LABELS not in stored.parts:
                raise DataError(
                    f"shard {path}, sample '{printable(stored.key)}': holds no {LABELS}; see `scinet data validate`"
                )
            try:
                yield parse_labels(stored.parts[LABELS])
            except ValueError as error:
                raise DataError(
                    f"shard {path}, sample '{printable(stored.key)}': its labels are not usable: {error}"
                ) from error
            found += 1
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"shard {path} is damaged after sample {found} of {num_samples}: {error}") from error
    if found != num_samples:
        raise DataError(f"shard {path} holds {found} samples, the data card says {num_samples}")


def split_labels(card: DataCard, split: str, progress: Callable[[int, int], None]) -> Iterator[Labels]:
    """Yield the labels of a split in written order, its classes checked; ``progress`` hears of each shard.

    Raises:
        DataError: as :func:`labels_of`, or if a class is out of range.
    """
    total, done = card.split(split).num_samples, 0
    for shard in card.split(split).shards:
        for labels in labels_of(card.directory / shard.file, shard.num_samples):
            try:
                check_range(labels, card.num_classes, card.num_indices)
            except ValueError as error:
                where = f"shard {shard.file}, sample '{printable(labels.sample_id)}'"
                raise DataError(f"{where}: its labels are not usable: {error}") from error
            yield labels
        done += shard.num_samples
        progress(done, total)


def in_parallel(function: Callable[[Task], Result], tasks: Sequence[Task], jobs: int) -> Iterator[Result]:
    """Yield the results of tasks in their order, computed by ``jobs`` processes; few are kept waiting.

    Raises:
        DataError: if the system ended one of the processes.
    """
    if jobs == 1 or len(tasks) < 2:
        yield from map(function, tasks)
        return
    # forked processes would inherit locks that a thread of torch or rich may hold
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=get_context("spawn")) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) > _PENDING_A_JOB * jobs:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                f"the system ended one of {jobs} reading processes, most likely for its memory: use fewer --jobs"
            ) from error
        finally:
            for future in waiting:
                future.cancel()
