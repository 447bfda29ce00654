"""CSV label tables: one column a class, or a column of names."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scinet.data.formats.lines import LineFile
from scinet.data.formats.table_rows import Row, Rows, TableOptions, class_places, image_name
from scinet.errors import ConfigError, DataError, nearest

UNLISTED = "unlisted"
"""The code that ``--negative`` and ``--unknown`` use for a class that a list column does not name."""


def read_csv(options: TableOptions, declared: list[str] | None) -> tuple[list[str], Rows]:
    """Return the class names and the rows of a CSV; ``declared`` are the names that it must use, in their order."""
    if options.list_column is not None:
        return _read_list_column(options, options.list_column, declared)
    return _read_columns(options, declared)


def _csv(path: Path) -> tuple[list[str], Iterator[tuple[int, int, list[str]]]]:
    """Return the header, and (offset, line, cells) of every row below it, blank lines at the end left out."""

    def rows() -> Iterator[tuple[int, int, list[str]]]:
        file = LineFile(path)
        reader = csv.reader(text for _, text in file)
        blank = 0
        while True:
            offset, line = file.offset, reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                reason = "its lines end in CR alone" if "new-line" in str(error) else error
                raise DataError(f"{path} line {line} is not readable as CSV: {reason}") from error
            if cells is None:
                return
            blank = 0 if cells else blank + 1
            if cells or (blank == 1 and any(text.strip() for _, text in LineFile(path, file.offset))):
                yield offset, line, cells

    found = rows()
    _, _, header = next(found, (0, 0, []))
    other = {"\t": "tabs", ";": "semicolons"}
    mark = next((mark for mark in other if len(header) == 1 and mark in header[0]), None)
    if mark is not None:
        raise DataError(f"{path} is separated by {other[mark]}, expected commas: save it as CSV with commas")
    header = [cell.strip() for cell in header]
    if not header:
        raise DataError(f"{path} is empty")
    if len(header) < 2:
        raise DataError(f"{path} has no column after its first; its header is '{', '.join(header)}'")
    if set(header[1:]) <= {"", "0", "1", "-1"}:
        raise DataError(f"{path} line 1 holds labels where the class names should be: put a header above it")
    return header, found


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
    if "" in names:
        raise DataError(f"{options.labels}: column {names.index('') + 2} has no name in the header")
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
        return Row(image_name(options, cells[0].strip(), line), tuple(signs[0]), tuple(signs[1]), line)

    rows = Rows(row)
    for offset, line, cells in _checked(options, header, found):
        rows.append(offset, line, image_name(options, cells[0].strip(), line))
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
    given = {"--negative": negative, "--unknown": unknown}
    for option, code in given.items():
        if code == "1":
            raise ConfigError(f"{option} 1: the code 1 means present")
        if code is not None and code not in (*codes, "", "0", "-1"):
            seen = ", ".join(sorted(c or "blank" for c in codes))
            raise ConfigError(f"{option} {code}: {path} has no such code, it has {seen}{nearest(code, codes)}")
    if negative is not None and negative == unknown:
        raise ConfigError(f"--negative {negative} and --unknown {unknown} say two things about one code")
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
    """Read a column of names between ``;``, ``|`` or a given separator; other columns but the first are passed over."""
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
        return Row(image_name(options, cells[0].strip(), line), positives, negatives, line)

    rows, seen, separator, comma = Rows(row), dict[str, int](), options.separator or "", 0
    for offset, line, cells in _checked(options, header, found):
        rows.append(offset, line, image_name(options, cells[0].strip(), line))
        if options.separator is None:
            used = {mark for mark in ";|" if mark in cells[place]} | ({separator} - {""})
            if len(used) > 1:
                raise DataError(
                    f"{options.labels} line {line}: column '{column}' separates names both by ';' and by '|'"
                )
            separator = next(iter(used), separator)
            comma = comma or line * ("," in cells[place])
        for name in _split_names(cells[place], separator):
            seen.setdefault(name, line)
    if comma and not separator:
        raise ConfigError(
            f"{options.labels} line {comma}: column '{column}' holds commas but no ';' or '|': say what separates its "
            "names with --separator ','"
        )
    names, position = class_places(options, declared, seen)
    return names, rows


def _split_names(cell: str, separator: str) -> list[str]:
    return [name.strip() for name in (cell.split(separator) if separator else [cell]) if name.strip()]
