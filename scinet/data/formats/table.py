"""Label tables: CSV with one column a class or a column of names, or JSONL with lists of names."""

from __future__ import annotations

import array
import csv
import dataclasses
import glob
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from scinet.data.archives import read_source
from scinet.data.formats.lines import LineFile
from scinet.data.records import Collection, ImageSource, Record, check_folder
from scinet.errors import ConfigError, DataError, nearest

UNLISTED = "unlisted"
"""The code that ``--negative`` and ``--unknown`` use for a class that a list column does not name."""
_NUM_HINTS = 3


@dataclass(frozen=True)
class TableOptions:
    """How a label table is read."""

    labels: Path
    images: Path
    classes: Path | None = None
    negative: str | None = None
    unknown: str | None = None
    test_samples: int = 0
    shuffle_seed: int = 0
    list_column: str | None = None


class Row(NamedTuple):
    """One image's labels, as indices into the class list."""

    file: str
    positives: tuple[int, ...]
    negatives: tuple[int, ...]
    line: int


class Rows:
    """The rows of a table, read again when asked for: sixteen bytes a row stay in memory."""

    def __init__(self, read: Callable[[int, int], Row]) -> None:
        """Begin without a row; ``read`` gets a row's offset and its line number."""
        self._read = read
        self._offsets, self._lines = array.array("Q"), array.array("Q")

    def append(self, offset: int, line: int) -> None:
        """Note where a row lies."""
        self._offsets.append(offset)
        self._lines.append(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, number: int) -> Row:
        """Read a row."""
        return self._read(self._offsets[number], self._lines[number])


def collection(options: TableOptions, name: str = "") -> Collection:
    """Return a label table as a collection: rows in an order shuffled with the seed, the last ones for the test split.

    Raises:
        ConfigError: if a file is missing, or a code is ambiguous and no option says what it means.
        DataError: naming the line that is wrong.
    """
    class_names, rows = read(options)
    if not 0 <= options.test_samples < max(len(rows), 1):
        raise ConfigError(f"--test {options.test_samples} leaves no training row of {len(rows)}")
    described = {key: str(value) for key, value in dataclasses.asdict(options).items() if value is not None}
    return Collection(
        name=name,
        class_names=class_names,
        source={"name": options.labels.name, "rows": len(rows), "options": described},
        records=lambda: _records(options, rows),
        num_records=len(rows),
        load=read_source,
    )


def _records(options: TableOptions, rows: Rows) -> Iterator[Record]:
    order = list(range(len(rows)))
    random.Random(options.shuffle_seed).shuffle(order)
    first_test, num_missing = len(rows) - options.test_samples, 0
    for place, number in enumerate(order):
        row = rows[number]
        path = options.images / row.file
        image, expected = None, str(path)
        if path.is_file():
            size = path.stat().st_size
            image = ImageSource(str(path), "", 0, size, size)
        else:
            num_missing += 1
            expected += f" of {options.labels.name} line {row.line}"
            if num_missing <= _NUM_HINTS and path.parent.is_dir():
                expected += nearest(str(path), map(str, path.parent.glob(f"{glob.escape(path.stem[:3])}*")))
        split = "test" if place >= first_test else "train"
        yield Record(row.file, image, expected, row.positives, row.negatives, split)


def read(options: TableOptions) -> tuple[list[str], Rows]:
    """Return the class names and the rows of a label table, after a look at every row.

    Args:
        options: where the table is and what its codes mean.

    Raises:
        ConfigError: if a file is missing, or a code is ambiguous and no option says what it means.
        DataError: naming the line that is wrong.
    """
    if not options.labels.is_file():
        beside = [str(found) for found in options.labels.parent.glob("*")]
        raise ConfigError(f"label file {options.labels} does not exist{nearest(str(options.labels), beside)}")
    check_folder(options.images, "image folder")
    declared = _class_list(options.classes) if options.classes else None
    if options.labels.suffix.lower() in (".jsonl", ".ndjson"):
        return _read_jsonl(options.labels, declared)
    if options.list_column is not None:
        return _read_list_column(options, options.list_column, declared)
    return _read_columns(options, declared)


def _class_list(path: Path) -> list[str]:
    if not path.is_file():
        raise ConfigError(f"class list {path} does not exist")
    names = [text.strip() for _, text in LineFile(path) if text.strip()]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise DataError(f"class list {path} names '{sorted(repeated)[0]}' more than once")
    return names


# --- CSV --------------------------------------------------------------------------------------------------------------


def _csv(path: Path) -> tuple[list[str], Iterator[tuple[int, int, list[str]]]]:
    """Return the header, and (offset, line, cells) of every row below it, blank lines at the end left out."""

    def rows() -> Iterator[tuple[int, int, list[str]]]:
        file = LineFile(path)
        reader = csv.reader(text for _, text in file)
        blank = 0
        for line in range(1, 2**62):
            offset = file.offset
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{path} is not readable as CSV: {error}") from error
            if cells is None:
                return
            blank = 0 if cells else blank + 1
            if cells or (blank == 1 and any(text.strip() for _, text in LineFile(path, file.offset))):
                yield offset, line, cells

    found = rows()
    _, _, header = next(found, (0, 0, []))
    return [cell.strip() for cell in header], found


def _cells(path: Path, offset: int) -> list[str]:
    return next(csv.reader(text for _, text in LineFile(path, offset)))


def _checked(options: TableOptions, header: list[str], rows: Iterator[tuple[int, int, list[str]]]) -> Iterator[Any]:
    line = 0
    for offset, line, cells in rows:
        if len(cells) != len(header):
            raise DataError(f"{options.labels} line {line} has {len(cells)} cells, the header has {len(header)}")
        yield offset, line, cells
    if not line:
        raise DataError(f"{options.labels} has no row below its header")


def _read_columns(options: TableOptions, declared: list[str] | None) -> tuple[list[str], Rows]:
    header, found = _csv(options.labels)
    names = header[1:]
    repeated = [name for number, name in enumerate(names) if name in names[:number]]
    if repeated:
        raise DataError(f"{options.labels} has more than one column '{repeated[0]}'")
    if declared is not None:
        _compare_classes(options, names, declared)
    order = declared or names
    number = {name: place for place, name in enumerate(order)}
    position = [number[name] for name in names]
    codes: dict[str, int] = {}

    def row(offset: int, line: int) -> Row:
        cells = _cells(options.labels, offset)
        labels = [meaning[cell.strip()] for cell in cells[1:]]
        signs = [sorted(p for p, label in zip(position, labels, strict=True) if label == sign) for sign in (1, -1)]
        return Row(cells[0].strip(), tuple(signs[0]), tuple(signs[1]), line)

    rows = Rows(row)
    for offset, line, cells in _checked(options, header, found):
        rows.append(offset, line)
        for cell in cells[1:]:
            codes.setdefault(cell.strip(), line)
    meaning = meanings(options.labels, codes, negative=options.negative, unknown=options.unknown)
    return order, rows


def _compare_classes(options: TableOptions, names: list[str], declared: list[str]) -> None:
    for name in names:
        if name not in declared:
            raise DataError(f"{options.labels}: column '{name}' is not in {options.classes}{nearest(name, declared)}")
    if len(names) != len(declared):
        missing = [name for name in declared if name not in names]
        raise DataError(
            f"{options.labels} has {len(names)} label columns but {options.classes} lists {len(declared)} classes; "
            f"no column for '{missing[0]}'"
        )


def meanings(path: Path, codes: dict[str, int], *, negative: str | None, unknown: str | None) -> dict[str, int]:
    """Return what each code of a table means; refuses to guess whether -1 or 0 is "absent" or "not annotated".

    Args:
        path: of the table, for messages.
        codes: each with the line it is first seen on.
        negative: the code that means absent, or None.
        unknown: the code that means not annotated, or None.

    Returns:
        code to +1 present, -1 absent, 0 unknown.

    Raises:
        ConfigError: if a code can mean two things.
        DataError: if it can mean none.
    """
    for code, line in codes.items():
        if code not in ("", "0", "1", "-1", negative, unknown):
            raise DataError(f"{path} line {line}: label '{code}' is none of 1, 0, -1 or blank")
    meaning = {"": 0, "1": 1}
    if negative is not None:
        meaning[negative] = -1
    if unknown is not None:
        meaning[unknown] = 0
    if "-1" not in codes:
        meaning.setdefault("0", -1)
    unclear = sorted(code for code in codes if code not in meaning)
    if unclear:
        raise ConfigError(
            f"{path} uses the codes {', '.join(sorted(c or 'blank' for c in codes))} and '{unclear[0]}' can "
            "mean absent or not annotated: say which with --negative CODE or --unknown CODE"
        )
    return meaning


def _read_list_column(options: TableOptions, column: str, declared: list[str] | None) -> tuple[list[str], Rows]:
    """Read a column of names between ``;`` or ``|``; other columns than it and the first are passed over."""
    header, found = _csv(options.labels)
    if column not in header[1:]:
        raise DataError(f"{options.labels} has no column '{column}' after its first{nearest(column, header[1:])}")
    place = header.index(column, 1)
    if [options.negative, options.unknown].count(UNLISTED) != 1:
        raise ConfigError(
            f"a class that column '{column}' of {options.labels} does not name can be absent or not annotated: "
            f"say which with --negative {UNLISTED} or --unknown {UNLISTED}"
        )

    def row(offset: int, line: int) -> Row:
        cells = _cells(options.labels, offset)
        positives = tuple(sorted({position[name] for name in _split_names(cells[place], separator)}))
        negatives: tuple[int, ...] = ()
        if options.negative == UNLISTED:
            negatives = tuple(sorted(set(range(len(names))) - set(positives)))
        return Row(cells[0].strip(), positives, negatives, line)

    rows, seen, separator = Rows(row), dict[str, int](), ""
    for offset, line, cells in _checked(options, header, found):
        rows.append(offset, line)
        used = {mark for mark in ";|" if mark in cells[place]} | ({separator} - {""})
        if len(used) > 1:
            raise DataError(f"{options.labels} line {line}: column '{column}' separates names both by ';' and by '|'")
        separator = next(iter(used), separator)
        for name in _split_names(cells[place], separator):
            seen.setdefault(name, line)
    names = declared or sorted(seen)
    position = {name: number for number, name in enumerate(names)}
    for name, line in seen.items():
        if name not in position:
            raise DataError(
                f"{options.labels} line {line}: class '{name}' is not in {options.classes}{nearest(name, names)}"
            )
    return names, rows


def _split_names(cell: str, separator: str) -> list[str]:
    return [name.strip() for name in (cell.split(separator) if separator else [cell]) if name.strip()]


# --- JSONL ------------------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path, declared: list[str] | None) -> tuple[list[str], Rows]:
    def row(offset: int, line: int) -> Row:
        _, text = next(iter(LineFile(path, offset)))
        file, positives, negatives = _parse_jsonl(path, text, line)
        signs = [sorted({position[name] for name in labels}) for labels in (positives, negatives)]
        return Row(file, tuple(signs[0]), tuple(signs[1]), line)

    rows, seen = Rows(row), dict[str, int]()
    for line, (offset, text) in enumerate(LineFile(path), start=1):
        if not text.strip():
            continue
        rows.append(offset, line)
        _, positives, negatives = _parse_jsonl(path, text, line)
        both = sorted(set(positives) & set(negatives))
        if both:
            raise DataError(f"{path} line {line}: class '{both[0]}' is positive and negative at once")
        for name in [*positives, *negatives]:
            seen.setdefault(name, line)
    names = declared or sorted(seen)
    position = {name: number for number, name in enumerate(names)}
    for name, line in seen.items():
        if name not in position:
            raise DataError(f"{path} line {line}: class '{name}' is not in the class list{nearest(name, names)}")
    return names, rows


def _parse_jsonl(path: Path, text: str, line: int) -> tuple[str, list[str], list[str]]:
    try:
        record = json.loads(text)
        return str(record["file"]), _names(record["positives"]), _names(record.get("negatives", []))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} line {line} is not an object with 'file', 'positives' and optionally 'negatives': {error}"
        ) from error


def _names(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list of class names")
    return [str(name) for name in value]
