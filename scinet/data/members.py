"""Shards read sample by sample for looking at: strict about what a member may be, and without torch.

Training reads through :mod:`scinet.data.stream`; the tools here read every label and, where asked, every image.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from scinet.data.card import DataCard
from scinet.errors import DataError

IMAGE_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
"""Extension of an image member to Pillow's name of its format; with ``json`` the closed list of members."""

LABELS = "json"
_MEMBER = re.compile(rf"([^./]+)\.({'|'.join([*IMAGE_FORMATS, LABELS])})")
_PENDING_A_JOB = 4

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Labels:
    """What the JSON member of a sample says."""

    sample_id: str
    index: int
    positives: tuple[int, ...]
    negatives: tuple[int, ...]


@dataclass
class StoredMembers:
    """Members that follow each other under one key; ``problems`` holds (what, name of the member)."""

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)


def parse_labels(content: bytes | str, *, needs_index: bool = True) -> Labels:
    """Return the labels of a JSON member, or of a line of a mask, which has no index (-1).

    Raises:
        ValueError: with the reason, if it is not what ``scinet data build`` writes; classes are not compared here.
    """
    try:
        tree = json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from error
    if not isinstance(tree, dict):
        raise ValueError(f"a {type(tree).__name__}, expected an object")
    tree = tree if needs_index else {"index": -1, **tree}
    missing = [key for key in ("id", "index", "positives", "negatives") if key not in tree]
    if missing:
        raise ValueError(f"no '{missing[0]}'")
    if not isinstance(tree["id"], str) or not tree["id"]:
        raise ValueError("'id' is no text")
    if not _is_int(tree["index"]):
        raise ValueError("'index' is no whole number")
    for key in ("positives", "negatives"):
        if not isinstance(tree[key], list) or not all(_is_int(label) for label in tree[key]):
            raise ValueError(f"'{key}' is no list of whole numbers")
    return Labels(tree["id"], tree["index"], tuple(tree["positives"]), tuple(tree["negatives"]))


def _is_int(value: Any) -> bool:
    # json reads integers of any length; those beyond 64 bits fit no array
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**62


def stored_members(path: Path, *, with_images: bool) -> Iterator[StoredMembers]:
    """Yield the samples of a tar as the reader groups them, with what is wrong about their members.

    Args:
        path: a shard.
        with_images: read the images too; without, they are skipped in the file and their parts are empty.

    Raises:
        tarfile.TarError, OSError, EOFError, ValueError: where the tar is damaged.
    """
    largest = path.stat().st_size
    current: StoredMembers | None = None
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would keep a record of every member
            matched = _MEMBER.fullmatch(member.name)
            # a sparse member of a few bytes can claim terabytes
            is_plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
            if matched is None or not is_plain or member.size > largest:
                # at once: the tar may end before the sample does
                yield StoredMembers(member.name, problems=[("member-foreign", member.name)])
                continue
            key, extension = matched.groups()
            if current is None or current.key != key:
                if current is not None:
                    yield current
                current = StoredMembers(key)
            if extension in current.parts:
                current.problems.append(("member-twice", member.name))
            else:
                current.parts[extension] = _content(tar, member, skip=extension != LABELS and not with_images)
    if current is not None:
        yield current


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, *, skip: bool) -> bytes:
    file = None if skip else tar.extractfile(member)
    content = b"" if file is None else file.read()
    if not skip and len(content) != member.size:
        raise EOFError(f"member '{member.name}' is cut off")
    return content


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
                raise DataError(f"shard {path}, sample '{stored.key}': holds no {LABELS}; see `scinet data validate`")
            try:
                yield parse_labels(stored.parts[LABELS])
            except ValueError as error:
                raise DataError(f"shard {path}, sample '{stored.key}': its labels are {error}") from error
            found += 1
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
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
            outside = [c for c in (*labels.positives, *labels.negatives) if not 0 <= c < card.num_classes]
            if outside:
                raise DataError(
                    f"shard {shard.file}, sample '{labels.sample_id}': class {outside[0]} of {card.num_classes}"
                )
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
