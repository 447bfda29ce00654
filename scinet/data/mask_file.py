"""Label masks as files: which cells of which sample are known, and how.

The form is JSONL: a header with class names, ratio, seed and the data card's checksum, then one line a sample,
``{"id": ..., "positives": [class indices], "negatives": [...]}``. Masks that others publish also come as dense CSV.
"""

from __future__ import annotations

import csv
import json
import os
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from scinet.data.card import DataCard
from scinet.data.formats.table_csv import meanings
from scinet.data.labels import parse_labels
from scinet.data.masks import KNOWN_NEGATIVE, KNOWN_POSITIVE, UNKNOWN, text_key
from scinet.data.members import split_labels
from scinet.errors import ConfigError, DataError, nearest

FORMAT = "scinet-mask-1"


@dataclass(frozen=True)
class Header:
    """What a mask was made from; ratio and seed are None where its maker did not say."""

    class_names: tuple[str, ...]
    data_set: str
    split: str
    card_sha256: str
    num_samples: int
    known_ratio: float | None
    single_positive: bool
    seed: int | None


class Row(NamedTuple):
    """The known cells of one sample, as class indices, and the line they stand on."""

    sample_id: str
    positives: tuple[int, ...]
    negatives: tuple[int, ...]
    line: int = 0


class MaskTable:
    """The known cells of many samples, found by id; 12 bytes a sample and 4 a known cell."""

    def __init__(self, rows: Iterable[Row], num_classes: int, path: Path) -> None:
        """Take all rows.

        Raises:
            DataError: if an id comes twice or a class is out of range or positive and negative at once.
        """
        keys, starts, cells, lines = array("Q"), array("q", [0]), array("i"), array("q")
        for row in rows:
            lines.append(row.line)
            _check_row(row, num_classes, path)
            keys.append(text_key(row.sample_id))
            # class c is stored as c + 1, a negative one with a minus
            cells.extend(label + 1 for label in row.positives)
            cells.extend(-label - 1 for label in row.negatives)
            starts.append(len(cells))
        self.num_classes, self._path = num_classes, path
        self._starts, self._cells = np.array(starts), np.array(cells, dtype=np.int32)
        unsorted = np.array(keys, dtype=np.uint64)
        self._order = np.argsort(unsorted, kind="stable").astype(np.int32)
        self._keys = unsorted[self._order]
        twice = np.flatnonzero(self._keys[1:] == self._keys[:-1])
        if len(twice):
            first, second = (lines[int(self._order[place])] for place in (twice[0], twice[0] + 1))
            raise DataError(f"mask {path}: lines {first} and {second} are about the same sample")

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._keys)

    def find(self, sample_id: str) -> int | None:
        """Return the number of a sample's row in the file, or None."""
        key = np.uint64(text_key(sample_id))
        place = int(np.searchsorted(self._keys, key))
        return int(self._order[place]) if place < len(self._keys) and self._keys[place] == key else None

    def observe(self, sample_id: str) -> npt.NDArray[np.int8]:
        """Return observed [C] int8 of a sample.

        Raises:
            DataError: if the file does not have it.
        """
        row = self.find(sample_id)
        if row is None:
            raise DataError(f"mask {self._path} has no sample '{sample_id}'")
        cells = self._cells[self._starts[row] : self._starts[row + 1]]
        observed = np.full(self.num_classes, UNKNOWN, dtype=np.int8)
        observed[np.abs(cells) - 1] = np.where(cells > 0, KNOWN_POSITIVE, KNOWN_NEGATIVE)
        return observed


def _check_row(row: Row, num_classes: int, path: Path) -> None:
    outside = [label for label in (*row.positives, *row.negatives) if not 0 <= label < num_classes]
    if outside:
        raise DataError(f"mask {path} line {row.line}: class {outside[0]} is out of range, there are {num_classes}")
    both = set(row.positives) & set(row.negatives)
    if both:
        raise DataError(f"mask {path} line {row.line}: class {min(both)} is positive and negative at once")


def write(path: Path, header: Header, rows: Iterable[Row]) -> None:
    """Write a mask whole or not at all.

    Raises:
        ConfigError: if the file exists or its folder cannot be written.
    """
    if path.exists():
        raise ConfigError(f"{path} exists: name another file with --out, or remove it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"format": FORMAT, **asdict(header)}) + "\n")
            for row in rows:
                tree = {"id": row.sample_id, "positives": list(row.positives), "negatives": list(row.negatives)}
                file.write(json.dumps(tree) + "\n")
        temporary.rename(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_header(path: Path) -> Header:
    """Return the first line of a mask written by :func:`write`.

    Raises:
        ConfigError: if the file does not exist.
        DataError: if it is no such mask.
    """
    with _opened(path) as file:
        try:
            tree = json.loads(file.readline())
            if tree["format"] != FORMAT:
                raise ValueError(f"format '{tree['format']}'")
            return Header(
                class_names=tuple(str(name) for name in tree["class_names"]),
                data_set=str(tree.get("data_set", "")),
                split=str(tree.get("split", "")),
                card_sha256=str(tree.get("card_sha256", "")),
                num_samples=int(tree.get("num_samples", 0)),
                known_ratio=None if tree.get("known_ratio") is None else float(tree["known_ratio"]),
                single_positive=bool(tree.get("single_positive", False)),
                seed=None if tree.get("seed") is None else int(tree["seed"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise DataError(
                f"{path} is no mask: its first line must be an object with format '{FORMAT}' and class_names "
                f"({type(error).__name__} {error})"
            ) from error


def read(path: Path, class_names: tuple[str, ...], *, negative: str | None, unknown: str | None) -> Iterator[Row]:
    """Yield the rows of a mask of either form, its classes in the data card's order.

    Args:
        path: of a ``.csv`` table, or of a file written by :func:`write`.
        class_names: of the data card; the file may have them in another order.
        negative: as in :func:`read_csv`.
        unknown: as in :func:`read_csv`.

    Raises:
        ConfigError: if the file does not exist, is of another kind, or a code can mean two things.
        DataError: naming the class or line that is wrong.
    """
    if path.suffix.lower() in (".npy", ".npz", ".pkl", ".pt", ".mat"):
        raise ConfigError(
            f"{path}: a bare matrix does not say which row is which image; save it as CSV with an id column and a "
            "column a class, or as JSONL"
        )
    if path.suffix.lower() == ".csv":
        yield from read_csv(path, class_names, negative=negative, unknown=unknown)
        return
    names = read_header(path).class_names
    check_classes(path, names, class_names)
    position = {name: place for place, name in enumerate(class_names)}
    places = [position[name] for name in names]
    for row in _read_rows(path):
        _check_row(row, len(names), path)
        positives, negatives = (
            tuple(sorted(places[label] for label in labels)) for labels in (row.positives, row.negatives)
        )
        yield Row(row.sample_id, positives, negatives, row.line)


def _read_rows(path: Path) -> Iterator[Row]:
    with _opened(path) as file:
        file.readline()
        for line, text in enumerate(file, start=2):
            if not text.strip():
                continue
            try:
                labels = parse_labels(text, needs_index=False)
            except ValueError as error:
                raise DataError(f"mask {path} line {line}: {error}") from error
            yield Row(labels.sample_id, labels.positives, labels.negatives, line)


def read_csv(path: Path, class_names: tuple[str, ...], *, negative: str | None, unknown: str | None) -> Iterator[Row]:
    """Yield the rows of a dense table: an id, then one column a class with 1, 0, -1 or nothing.

    Args:
        path: of the table.
        class_names: of the data card; the columns may stand in another order.
        negative: the code that means known to be absent, where the codes leave it open.
        unknown: the code that means not known.

    Raises:
        ConfigError: if a code can mean two things.
        DataError: naming the line or column that is wrong.
    """
    places, codes = _survey(path, class_names)
    if set(codes) <= {"0", "1"} and negative is None and unknown is None:
        raise ConfigError(
            f"{path} uses the codes {', '.join(sorted(codes))} only, so it hides nothing if 0 means absent: say "
            "--unknown 0 if it means not known, or --negative 0"
        )
    meaning = meanings(path, codes, negative=negative, unknown=unknown)
    for line, cells in _csv_lines(path):
        if line == 1:
            continue
        signs = [meaning[cell.strip()] for cell in cells[1:]]
        known = {sign: sorted(place for place, s in zip(places, signs, strict=True) if s == sign) for sign in (1, -1)}
        yield Row(cells[0].strip(), tuple(known[1]), tuple(known[-1]), line)


def _survey(path: Path, class_names: tuple[str, ...]) -> tuple[list[int], dict[str, int]]:
    """Return the class of each column, and each code with the line it is first seen on."""
    places: list[int] = []
    codes: dict[str, int] = {}
    width = 0
    for line, cells in _csv_lines(path):
        if line == 1:
            width, position = len(cells), {name: place for place, name in enumerate(class_names)}
            names = [cell.strip() for cell in cells[1:]]
            check_classes(path, names, class_names)
            places = [position[name] for name in names]
        elif len(cells) != width:
            raise DataError(f"{path} line {line} has {len(cells)} cells, the header has {width}")
        else:
            for cell in cells[1:]:
                codes.setdefault(cell.strip(), line)
    if not codes:
        raise DataError(f"{path} has no row below its header")
    return places, codes


def check_classes(path: Path, names: Iterable[str], class_names: tuple[str, ...]) -> None:
    """Check that a mask has the card's classes, each once, in any order.

    Raises:
        DataError: naming the first that is too many or missing.
    """
    given, known = list(names), set(class_names)
    for name in given:
        if name not in known:
            raise DataError(f"{path}: class '{name}' is not in the data card{nearest(name, class_names)}")
    missing = [name for name in class_names if name not in set(given)] if set(given) != known else []
    if missing:
        raise DataError(f"{path} has {len(given)} classes, the data card {len(class_names)}: '{missing[0]}' is missing")
    if len(given) != len(class_names):
        raise DataError(f"{path} names a class more than once")


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    with _opened(path, newline="") as file:
        try:
            yield from ((line, cells) for line, cells in enumerate(csv.reader(file), start=1) if cells)
        except csv.Error as error:
            raise DataError(f"{path} is not readable as CSV: {error}") from error


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[Any]:
    if path.exists() and not path.is_file():
        raise ConfigError(f"mask {path} is no file")
    if not path.is_file():
        beside = [str(found) for found in path.parent.glob("*")] if path.parent.is_dir() else []
        raise ConfigError(f"mask {path} does not exist{nearest(str(path), beside)}")
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def load(path: Path) -> MaskTable:
    """Return a mask written by :func:`write`, ready to observe with.

    Raises:
        ConfigError: if the file does not exist.
        DataError: if it is no mask, or a line is wrong.
    """
    return MaskTable(_read_rows(path), len(read_header(path).class_names), path)


def check_covers(path: Path, card: DataCard) -> None:
    """Check that a run can train with a mask: the card's classes in its order, and every training sample that is local.

    Raises:
        ConfigError: if the file does not exist.
        DataError: naming what is missing and how many more are.
    """
    header, table = read_header(path), load(path)
    if header.class_names != card.class_names:
        check_classes(path, header.class_names, card.class_names)
        raise DataError(
            f"{path} has the classes in another order than the data card: write it anew with "
            f"`scinet data mask {card.directory} --from {path} --out FILE`"
        )
    if card.url:
        return  # it would have to be downloaded: each sample is looked up when it is read
    rows = split_labels(card, "train", lambda *_: None)
    missing = [labels.sample_id for labels in rows if table.find(labels.sample_id) is None]
    if missing:
        total = card.split("train").num_samples
        raise DataError(f"{path} has no sample '{missing[0]}'; {len(missing)} of {total} training samples are missing")
