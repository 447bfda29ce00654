"""``scinet data validate``: reads every shard, label and image of a data set and lists all that is wrong.

Each shard is looked at by itself (in parallel); what must hold over all of them (unique ids, unique images, counts) is
checked on arrays of hashes, 24 bytes a sample.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from scinet.data import card as data_card
from scinet.data.card import SPLITS, DataCard, Shard
from scinet.data.findings import NUM_EXAMPLES, Findings
from scinet.data.images import IMAGE_FORMATS, format_of, opened
from scinet.data.labels import Labels, parse_labels
from scinet.data.members import LABELS, StoredMembers, in_parallel, stored_members
from scinet.errors import DataError

Hashes = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ShardTask:
    """A shard to be looked at."""

    path: Path
    shard: Shard
    num_classes: int
    num_indices: int


@dataclass(frozen=True)
class ShardReport:
    """What one shard holds: a hash of each id and image, the indices, and the labels' counts by class."""

    findings: Findings
    ids: Hashes
    images: Hashes
    indices: Counts
    positives: Counts
    negatives: Counts


def validate(directory: Path, *, jobs: int, progress: Callable[[str, int, int], None]) -> tuple[DataCard, Findings]:
    """Return the card of a folder and everything that is wrong with the folder.

    Args:
        directory: written by ``scinet data build``.
        jobs: processes that read shards.
        progress: told how many samples are done.

    Raises:
        ConfigError: if there is no card.
        DataError: if the card cannot be read at all.
    """
    card = data_card.read(directory, checks_shards=False)
    findings = Findings()
    usable = _usable_shards(card, findings)
    total = card.num_samples
    tasks = [ShardTask(directory / shard.file, shard, card.num_classes, card.num_indices) for _, shard in usable]
    counted = {split: np.zeros((2, card.num_classes), dtype=np.int64) for split in card.splits}
    reports: list[ShardReport] = []
    done = 0
    for (split, shard), report in zip(usable, in_parallel(look_at_shard, tasks, jobs), strict=True):
        findings.merge(report.findings)
        counted[split] += np.stack([report.positives, report.negatives])
        # the counts are added up above: one row of them a shard would be gigabytes for many classes
        nothing = np.zeros(0, dtype=np.int64)
        reports.append(ShardReport(Findings(), report.ids, report.images, report.indices, nothing, nothing))
        done += shard.num_samples
        progress("samples", done, max(total, done))
    _check_counts(card, usable, reports, counted, findings)
    _check_unique(card, usable, reports, findings)
    return card, findings


def _usable_shards(card: DataCard, findings: Findings) -> list[tuple[str, Shard]]:
    """Return the shards that can be opened, with their splits, and check what the card says by itself."""
    for name, times in Counter(card.class_names).items():
        if times > 1:
            findings.add("card-classes", f"'{name}'")
    if card.num_indices < card.num_samples:
        findings.add("card-counts", f"{card.num_indices} indices, {card.num_samples} samples")
    usable: list[tuple[str, Shard]] = []
    seen: set[str] = set()
    for split_name, split in card.splits.items():
        if split_name not in SPLITS:
            findings.add("split-name", f"'{split_name}'")
        for shard in split.shards:
            path = card.directory / shard.file
            if Path(shard.file).name != shard.file or shard.file in seen:
                findings.add("shard-name", shard.file)
            elif not path.is_file():
                findings.add("shard-missing", shard.file)
            else:
                usable.append((split_name, shard))
            seen.add(shard.file)
    for path in sorted(card.directory.glob("*.tar")):
        if path.name not in seen:
            findings.add("shard-unlisted", path.name)
    return usable


def look_at_shard(task: ShardTask) -> ShardReport:
    """Read one shard to its end, decode its images, and report; never stops at a fault that leaves it readable."""
    findings, name = Findings(), task.path.name
    ids: list[int] = []
    images: list[int] = []
    indices: list[int] = []
    counts = np.zeros((2, task.num_classes), dtype=np.int64)
    num_found = 0
    try:
        _check_file(task, findings)
        for stored in stored_members(task.path, with_images=True):
            num_found += bool(stored.parts)  # a stray member is no sample
            labels, image = _look_at_sample(stored, name, task, findings)
            if labels is not None:
                ids.append(_hash(labels.sample_id.encode(errors="surrogatepass")))
                images.append(image)
                indices.append(labels.index)
                for row, classes in enumerate((labels.positives, labels.negatives)):
                    np.add.at(counts[row], [c for c in classes if 0 <= c < task.num_classes], 1)
    except (tarfile.TarError, OSError, ValueError) as error:
        findings.add("shard-damaged", f"{name} after sample {num_found}: {error}")
    if num_found != task.shard.num_samples:
        findings.add("shard-samples", f"{name}: {num_found}, card {task.shard.num_samples}")
    return ShardReport(
        findings,
        np.array(ids, dtype=np.uint64),
        np.array(images, dtype=np.uint64),
        np.array(indices, dtype=np.int64),
        counts[0],
        counts[1],
    )


def _check_file(task: ShardTask, findings: Findings) -> None:
    size = task.path.stat().st_size
    if size != task.shard.num_bytes:
        findings.add("shard-size", f"{task.path.name}: {size} bytes, card {task.shard.num_bytes}")
    with task.path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != task.shard.sha256:
            findings.add("shard-checksum", task.path.name)


def _look_at_sample(
    stored: StoredMembers, shard: str, task: ShardTask, findings: Findings
) -> tuple[Labels | None, int]:
    """Return the labels, None where they cannot be read, and the image's hash, 0 where there is none."""
    where = f"{shard}:{stored.key}"
    for kind, member in stored.problems:
        findings.add(kind, f"{shard}:{member}")
    extensions = [extension for extension in stored.parts if extension != LABELS]
    if stored.parts and (LABELS not in stored.parts or len(extensions) != 1):
        findings.add("sample-incomplete", f"{where}: {', '.join(sorted(stored.parts))}")
    image = _image_hash(stored.parts[extensions[0]], extensions[0], where, findings) if extensions else 0
    if LABELS not in stored.parts:
        return None, image
    try:
        labels = parse_labels(stored.parts[LABELS])
    except ValueError as error:
        findings.add("labels-malformed", f"{where}: {error}")
        return None, image
    _check_labels(labels, where, task, findings)
    return labels, image


def _check_labels(labels: Labels, where: str, task: ShardTask, findings: Findings) -> None:
    positives, negatives = set(labels.positives), set(labels.negatives)
    outside = sorted(label for label in positives | negatives if not 0 <= label < task.num_classes)
    if outside:
        findings.add("class-range", f"{where}: class {outside[0]} of {task.num_classes}")
    if positives & negatives:
        findings.add("class-both", f"{where}: class {min(positives & negatives)}")
    if len(positives) < len(labels.positives) or len(negatives) < len(labels.negatives):
        findings.add("class-repeated", where)
    if not 0 <= labels.index < task.num_indices:
        findings.add("index-range", f"{where}: {labels.index} of {task.num_indices}")
    if not positives:
        findings.add("row-without-positive" if negatives else "row-empty", where)


def _image_hash(content: bytes, extension: str, where: str, findings: Findings) -> int:
    """Decode an image in full and return the hash of its pixels, or of its bytes where it cannot be decoded."""
    try:
        with opened(content, where) as image:
            kind = format_of(image)
            if kind not in IMAGE_FORMATS.values():
                raise DataError(f"{where}: {kind} is none of {', '.join(IMAGE_FORMATS.values())}")
            if kind != IMAGE_FORMATS[extension]:
                findings.add("image-extension", f"{where}.{extension}: {kind}")
            pixels = image.convert("RGB")
    except DataError as error:
        findings.add("image-broken", str(error))
        return _hash(content)
    # of the pixels: the same photograph with other metadata is the same image
    return _hash(repr(pixels.size).encode() + pixels.tobytes())


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _check_counts(
    card: DataCard,
    usable: list[tuple[str, Shard]],
    reports: list[ShardReport],
    counted: dict[str, Counts],
    findings: Findings,
) -> None:
    found = dict.fromkeys(card.splits, 0)
    for (place, _), report in zip(usable, reports, strict=True):
        found[place] += len(report.ids)
    for name, split in card.splits.items():
        if found[name] != split.num_samples:
            findings.add("card-counts", f"samples of {name}: {found[name]}, card {split.num_samples}")
        for row, (what, said) in enumerate((("positives", split.num_positives), ("negatives", split.num_negatives))):
            if len(said) != card.num_classes:
                findings.add("card-counts", f"{name} {what}: {len(said)} classes, card {card.num_classes}")
                continue
            wrong = np.flatnonzero(counted[name][row] != np.array(said, dtype=np.int64))
            names = [
                f"{name} {what} of '{card.class_names[c]}': {counted[name][row][c]}, card {said[c]}"
                for c in wrong[:NUM_EXAMPLES]
            ]
            if len(wrong):
                findings.add("card-counts", *names, count=len(wrong))
    if "train" in counted:
        unseen = np.flatnonzero(counted["train"][0] == 0)
        if len(unseen):
            names = [f"'{card.class_names[c]}'" for c in unseen[:NUM_EXAMPLES]]
            findings.add("class-unseen", *names, count=len(unseen))


@dataclass(frozen=True)
class _Rows:
    """Where each accepted sample lies: the number of its shard, and of its split."""

    shards: npt.NDArray[np.int32]
    splits: npt.NDArray[np.int8]
    starts: Counts  # the first row of each shard


def _check_unique(
    card: DataCard, usable: list[tuple[str, Shard]], reports: list[ShardReport], findings: Findings
) -> None:
    if not reports:
        return
    sizes = [len(report.ids) for report in reports]
    places = list(card.splits)
    rows = _Rows(
        np.repeat(np.arange(len(reports), dtype=np.int32), sizes),
        np.repeat(np.array([places.index(split) for split, _ in usable], dtype=np.int8), sizes),
        np.cumsum([0, *sizes]),
    )
    name = partial(_named, card, usable, rows)
    for kind, groups in (
        ("id-repeated", _repeated(np.concatenate([report.ids for report in reports]))),
        ("index-repeated", _repeated(np.concatenate([report.indices for report in reports]))),
    ):
        _add_groups(findings, kind, groups, name)
    images = np.concatenate([report.images for report in reports])
    test = places.index("test") if "test" in places else -1
    sorted_groups: dict[str, list[Counts]] = {"image-leak": [], "image-in-two-splits": [], "image-repeated": []}
    for group in _repeated(images, ignored=0):
        splits = set(rows.splits[group].tolist())
        kind = "image-repeated" if len(splits) == 1 else "image-leak" if test in splits else "image-in-two-splits"
        sorted_groups[kind].append(group)
    for kind, found in sorted_groups.items():
        _add_groups(findings, kind, found, name)


def _repeated(values: npt.NDArray[np.uint64] | Counts, ignored: int | None = None) -> Iterable[Counts]:
    """Yield the rows of each value that comes more than once, in the order of their first row."""
    order = np.argsort(values, kind="stable")
    in_order = values[order]
    starts = np.flatnonzero(np.r_[True, in_order[1:] != in_order[:-1]])
    ends = np.r_[starts[1:], len(values)]
    several = np.flatnonzero(ends - starts > 1)
    # the first row of a group is its smallest: the sort is stable
    for group in several[np.argsort(order[starts[several]], kind="stable")]:
        if ignored is None or in_order[starts[group]] != ignored:
            yield order[starts[group] : ends[group]]


def _add_groups(findings: Findings, kind: str, groups: Iterable[Counts], name: Callable[[Counts], str]) -> None:
    for number, group in enumerate(groups):
        findings.add(kind, *([name(group)] if number < NUM_EXAMPLES else []))


def _named(card: DataCard, usable: list[tuple[str, Shard]], rows: _Rows, group: Counts) -> str:
    """Name the first samples of a group; their shards are read again, as no id was kept."""
    words = []
    for row in group[:2].tolist():
        shard = int(rows.shards[row])
        split, file = usable[shard][0], usable[shard][1].file
        words.append(f"{_id_at(card.directory / file, row - int(rows.starts[shard]))} ({split}, {file})")
    rest = f" and {len(group) - 2} more" if len(group) > 2 else ""
    return " = ".join(words) + rest


def _id_at(path: Path, place: int) -> str:
    """Return the id of the n-th sample whose labels can be read."""
    try:
        for stored in stored_members(path, with_images=False):
            try:
                labels = parse_labels(stored.parts.get(LABELS, b""))
            except ValueError:
                continue
            if place == 0:
                return labels.sample_id
            place -= 1
    except (tarfile.TarError, OSError, ValueError):
        pass
    return "?"  # the shard changed since it was looked at
