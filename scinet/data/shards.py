"""Writing one shard: original image bytes and a JSON of ids and sparse labels, nothing else."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from scinet.data.cooccurrence import PairCounter
from scinet.data.images import BrokenImageError, storable
from scinet.data.records import ImageSource


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs to write one shard.

    Args:
        file: its name in ``directory``.
        directory: where it goes.
        sidecar: the JSON of counts, written last: a shard without one is not finished.
        plan: the file of planned samples; this shard's lines take ``length`` bytes from ``offset``.
        digest: SHA-256 of those lines.
        num_classes: C.
        load: returns the bytes of an image.
        reencode: see :func:`scinet.data.images.storable`.
        skip_broken: leave out images that cannot be decoded, instead of stopping.
    """

    file: str
    directory: Path
    sidecar: Path
    plan: Path
    offset: int
    length: int
    digest: str
    num_classes: int
    load: Callable[[ImageSource], bytes]
    reencode: bool
    skip_broken: bool


@dataclass(frozen=True)
class ShardReport:
    """What a shard holds; ``broken`` lists (sample id, where, reason) of the images left out.

    ``reencode`` is what the task allowed, ``num_reencoded`` how many images were of another format.
    """

    file: str
    plan_digest: str
    num_samples: int
    num_bytes: int
    sha256: str
    positives: dict[int, int]
    negatives: dict[int, int]
    pair_codes: list[int]
    pair_counts: list[int]
    broken: list[tuple[str, str, str]]
    reencode: bool
    num_reencoded: int


def write_shard(task: ShardTask) -> str:
    """Write one shard under a temporary name, rename it, then write its sidecar, and return its name.

    Raises:
        BrokenImageError: naming the first image that cannot be decoded, unless such are skipped.
        DataError: if the source cannot be read.
        OSError: if the shard cannot be written.
    """
    positive_counts: Counter[int] = Counter()
    negative_counts: Counter[int] = Counter()
    pairs, num_samples, num_reencoded = PairCounter(task.num_classes), 0, 0
    broken: list[tuple[str, str, str]] = []
    target = task.directory / task.file
    temporary = target.with_name(f".{task.file}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                for sample_id, index, source, positives, negatives in _planned(task):
                    try:
                        found = task.load(source)
                        content, extension = storable(found, f"image {source}", reencode=task.reencode)
                    except BrokenImageError as error:
                        if not task.skip_broken:
                            raise
                        broken.append((sample_id, str(source), str(error)))
                        continue
                    num_reencoded += content is not found
                    labels = {"id": sample_id, "index": index, "positives": positives, "negatives": negatives}
                    key = quote(sample_id, safe="").replace(".", "%2E")
                    parts = {extension: content, "json": json.dumps(labels, ensure_ascii=False).encode()}
                    for kind in sorted(parts):
                        _add(tar, f"{key}.{kind}", parts[kind])
                    positive_counts.update(positives)
                    negative_counts.update(negatives)
                    pairs.add(positives)
                    num_samples += 1
            flush_to_disk(file)
        with temporary.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        num_bytes = temporary.stat().st_size
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)
    report = ShardReport(
        file=task.file,
        plan_digest=task.digest,
        num_samples=num_samples,
        num_bytes=num_bytes,
        sha256=digest,
        positives=dict(positive_counts),
        negatives=dict(negative_counts),
        pair_codes=pairs.pairs()[0],
        pair_counts=pairs.pairs()[1],
        broken=broken,
        reencode=task.reencode,
        num_reencoded=num_reencoded,
    )
    write_json(task.sidecar, vars(report))
    return task.file


def _planned(task: ShardTask) -> Iterator[tuple[str, int, ImageSource, list[int], list[int]]]:
    with task.plan.open("rb") as plan:
        plan.seek(task.offset)
        lines = plan.read(task.length).splitlines()
    for line in lines:
        sample_id, index, source, positives, negatives = json.loads(line)
        yield sample_id, index, ImageSource(*source), positives, negatives


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # nothing but name and size: the same samples give the same bytes, hence the same checksum, on every machine
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o444
    tar.addfile(member, io.BytesIO(content))


def read_report(path: Path) -> ShardReport | None:
    """Return the sidecar of a finished shard, None if there is none or it is damaged."""
    try:
        tree = json.loads(path.read_bytes())
        for key in ("positives", "negatives"):
            tree[key] = {int(label): count for label, count in tree[key].items()}
        tree["broken"] = [tuple(entry) for entry in tree["broken"]]
        return ShardReport(**tree)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write a small file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with temporary.open("wb") as file:
        file.write(json.dumps(tree).encode())
        flush_to_disk(file)
    temporary.rename(path)


def flush_to_disk(file: BinaryIO) -> None:
    """Return when the file's bytes are on the disk, so that a rename never shows an empty file after a power cut."""
    file.flush()
    os.fsync(file.fileno())
