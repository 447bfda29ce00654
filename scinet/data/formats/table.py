"""Label tables as collections: CSV with one column a class or a column of names, or JSONL with lists of names."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

from scinet.data.archives import read_source
from scinet.data.formats.lines import LineFile
from scinet.data.formats.table_csv import read_csv
from scinet.data.formats.table_jsonl import read_jsonl
from scinet.data.formats.table_rows import Rows, TableOptions
from scinet.data.records import Collection, ImageSource, Record, check_folder, file_source
from scinet.errors import ConfigError, DataError, nearest

_NUM_HINTS = 3


def collection(options: TableOptions, name: str = "") -> Collection:
    """Return a label table as a collection: rows in an order shuffled with the seed, the last ones for the test split.

    Raises:
        ConfigError: if a file is missing, or a code is ambiguous and no option says what it means.
        DataError: naming the line that is wrong.
    """
    class_names, rows = read(options)
    twice = rows.repeated()
    if twice is not None:
        lines = " and ".join(str(row.line) for row in twice)
        raise DataError(f"{options.labels} lines {lines} are both about '{twice[0].file}'")
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
        image: ImageSource | None = None
        expected = str(path)
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(path)
            image = file_source(str(path), status) if stat.S_ISREG(status.st_mode) else None
        if image is None:
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
    return read_jsonl(options, declared) if options.is_jsonl else read_csv(options, declared)


def _class_list(path: Path) -> list[str]:
    if not path.is_file():
        raise ConfigError(f"class list {path} does not exist")
    names = [text.strip() for _, text in LineFile(path) if text.strip()]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise DataError(f"class list {path} names '{sorted(repeated)[0]}' more than once")
    return names
