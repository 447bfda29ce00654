"""Label tables: CSV with one column a class, or JSONL with lists of names."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scinet.data.images import opened
from scinet.data.shards import RawSample
from scinet.errors import ConfigError, DataError, nearest

_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


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
    skip_bad: bool = False


@dataclass(frozen=True)
class Row:
    """One image's labels, as indices into the class list."""

    file: str
    positives: tuple[int, ...]
    negatives: tuple[int, ...]
    line: int


def read(options: TableOptions) -> tuple[list[str], list[Row]]:
    """Return the class names and the rows of a label table.

    Args:
        options: where the table is and what its codes mean.

    Raises:
        ConfigError: if a file is missing, or a code is ambiguous and no option says what it means.
        DataError: naming the line that is wrong.
    """
    if not options.labels.is_file():
        beside = [str(found) for found in options.labels.parent.glob("*")]
        raise ConfigError(f"label file {options.labels} does not exist{nearest(str(options.labels), beside)}")
    if not options.images.is_dir():
        raise ConfigError(f"image folder {options.images} does not exist")
    declared = _class_list(options.classes) if options.classes else None
    if options.labels.suffix.lower() in (".jsonl", ".ndjson"):
        return _read_jsonl(options.labels, declared)
    return _read_csv(options, declared)


def samples(options: TableOptions, rows: list[Row]) -> Iterator[RawSample]:
    """Yield the images with their labels: rows shuffled with the seed, the last ``test_samples`` for the test split.

    Raises:
        DataError: naming the first image that is missing or cannot be decoded, unless ``skip_bad``.
    """
    order = list(range(len(rows)))
    random.Random(options.shuffle_seed).shuffle(order)
    if not 0 <= options.test_samples < max(len(rows), 1):
        raise ConfigError(f"--test {options.test_samples} leaves no training row of {len(rows)}")
    first_test = len(rows) - options.test_samples
    for place, number in enumerate(order):
        row = rows[number]
        try:
            content, extension = _read_image(options.images / row.file)
        except DataError as error:
            if options.skip_bad:
                continue
            raise DataError(f"{options.labels} line {row.line}: {error}; --skip-bad leaves such rows out") from error
        split = "test" if place >= first_test else "train"
        yield RawSample(row.file, content, extension, row.positives, row.negatives, split)


def _read_image(path: Path) -> tuple[bytes, str]:
    if not path.is_file():
        beside = [str(found) for found in path.parent.glob(f"{path.stem[:3]}*")] if path.parent.is_dir() else []
        raise DataError(f"image {path} does not exist{nearest(str(path), beside)}")
    content = path.read_bytes()
    with opened(content, f"image {path}") as image:
        kind = image.format or ""
        image.load()
    if kind not in _EXTENSIONS:
        raise DataError(f"image {path} is {kind}, expected one of {', '.join(_EXTENSIONS)}")
    return content, _EXTENSIONS[kind]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error


def _class_list(path: Path) -> list[str]:
    if not path.is_file():
        raise ConfigError(f"class list {path} does not exist")
    names = [line.strip() for line in _text(path).splitlines() if line.strip()]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise DataError(f"class list {path} names '{sorted(repeated)[0]}' more than once")
    return names


def _read_csv(options: TableOptions, declared: list[str] | None) -> tuple[list[str], list[Row]]:
    try:
        table = list(csv.reader(io.StringIO(_text(options.labels), newline="")))
    except csv.Error as error:
        raise DataError(f"{options.labels} is not readable as CSV: {error}") from error
    while table and not table[-1]:
        table.pop()  # blank lines at the end
    if len(table) < 2:
        raise DataError(f"{options.labels} has no row below its header")
    header = [cell.strip() for cell in table[0]]
    names = header[1:]
    repeated = [name for number, name in enumerate(names) if name in names[:number]]
    if repeated:
        raise DataError(f"{options.labels} has more than one column '{repeated[0]}'")
    if declared is not None:
        _compare_classes(options, names, declared)
    order = declared or names
    position = {name: order.index(name) for name in names}
    meaning = meanings(
        options.labels, _codes(options, table, len(header)), negative=options.negative, unknown=options.unknown
    )
    rows = []
    for line, cells in enumerate(table[1:], start=2):
        labels = [meaning[cell.strip()] for cell in cells[1:]]
        known = {
            sign: [position[n] for n, label in zip(names, labels, strict=True) if label == sign] for sign in (1, -1)
        }
        rows.append(Row(cells[0].strip(), tuple(sorted(known[1])), tuple(sorted(known[-1])), line))
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


def _codes(options: TableOptions, table: list[list[str]], width: int) -> dict[str, int]:
    """Return each code of the table with the line it is first seen on."""
    codes: dict[str, int] = {}
    for line, cells in enumerate(table[1:], start=2):
        if len(cells) != width:
            raise DataError(f"{options.labels} line {line} has {len(cells)} cells, the header has {width}")
        for cell in cells[1:]:
            codes.setdefault(cell.strip(), line)
    return codes


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


def _read_jsonl(path: Path, declared: list[str] | None) -> tuple[list[str], list[Row]]:
    records: list[tuple[int, dict[str, Any]]] = []
    for line, text in enumerate(_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
            record = {
                "file": str(record["file"]),
                "positives": _names(record["positives"]),
                "negatives": _names(record.get("negatives", [])),
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} line {line} is not an object with 'file', 'positives' and optionally 'negatives': {error}"
            ) from error
        records.append((line, record))
    names = declared or sorted({name for _, r in records for name in [*r["positives"], *r["negatives"]]})
    position = {name: number for number, name in enumerate(names)}
    rows = []
    for line, record in records:
        for name in [*record["positives"], *record["negatives"]]:
            if name not in position:
                raise DataError(f"{path} line {line}: class '{name}' is not in the class list{nearest(name, names)}")
        signs = [tuple(sorted({position[name] for name in record[key]})) for key in ("positives", "negatives")]
        if set(signs[0]) & set(signs[1]):
            both = names[min(set(signs[0]) & set(signs[1]))]
            raise DataError(f"{path} line {line}: class '{both}' is positive and negative at once")
        rows.append(Row(record["file"], signs[0], signs[1], line))
    return names, rows


def _names(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list of class names")
    return [str(name) for name in value]
