"""What is read of a label table: its options, and its rows one at a time."""

from __future__ import annotations

import array
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scinet.data.masks import text_key
from scinet.errors import DataError, nearest
from scinet.texttable import is_unicode


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
    separator: str | None = None
    is_jsonl: bool = False


class Row(NamedTuple):
    """One image's labels, as indices into the class list."""

    file: str
    positives: tuple[int, ...]
    negatives: tuple[int, ...]
    line: int


class Rows:
    """The rows of a table, read again when asked for: 24 bytes a row stay in memory."""

    def __init__(self, read: Callable[[int, int], Row]) -> None:
        """Begin without a row; ``read`` gets a row's offset and its line number."""
        self._read = read
        self._offsets, self._lines, self._keys = array.array("Q"), array.array("Q"), array.array("Q")

    def append(self, offset: int, line: int, file: str) -> None:
        """Note where a row lies, and which image it is about."""
        self._offsets.append(offset)
        self._lines.append(line)
        self._keys.append(text_key(file))

    def repeated(self) -> tuple[Row, Row] | None:
        """Return two rows about one image, if there are any."""
        keys = np.array(self._keys, dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        for place in np.flatnonzero(keys[order[1:]] == keys[order[:-1]]).tolist():
            first, second = self[int(order[place])], self[int(order[place + 1])]
            if first.file == second.file:
                return first, second
        return None

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, number: int) -> Row:
        """Read a row."""
        return self._read(self._offsets[number], self._lines[number])


def image_name(options: TableOptions, name: str, line: int) -> str:
    """Return the name of an image below the image folder, spelled in one way.

    Raises:
        DataError: if it names nothing, or something elsewhere.
    """
    if not is_unicode(name):
        raise DataError(f"{options.labels} line {line} names {name!a}, which holds half a character")
    file = os.path.normpath(os.path.relpath(name, options.images) if os.path.isabs(name) else name)
    if not name or file == "." or file.split(os.sep)[0] == ".." or "\0" in name:
        what = f"'{name}', which is not below {options.images}" if name else "no image"
        raise DataError(f"{options.labels} line {line} names {what}")
    return file


def class_places(
    options: TableOptions, declared: list[str] | None, seen: dict[str, int]
) -> tuple[list[str], dict[str, int]]:
    """Return the class names, and the index of each.

    Args:
        options: of the table.
        declared: the names that it must use, in their order; None: those it uses, sorted.
        seen: those it uses, each with the line it is first seen on.

    Raises:
        DataError: naming the line of a class that is not declared.
    """
    names = declared or sorted(seen)
    position = {name: number for number, name in enumerate(names)}
    for name, line in seen.items():
        if name not in position:
            hint = nearest(name, names)
            raise DataError(
                f"{options.labels} line {line}: class '{name}' is not in the class list {options.classes}{hint}"
            )
    return names, position
