"""JSONL label tables: one object a line, with lists of class names."""

from __future__ import annotations

import json
from pathlib import Path

from scinet.data.formats.lines import LineFile
from scinet.data.formats.table_rows import Row, Rows, TableOptions, class_places, image_name
from scinet.errors import DataError, nearest

_KEYS = ("file", "positives", "negatives")


def read_jsonl(options: TableOptions, declared: list[str] | None) -> tuple[list[str], Rows]:
    """Return the class names and the rows of a JSONL; ``declared`` are the names that it must use, in their order."""
    path = options.labels

    def row(offset: int, line: int) -> Row:
        _, text = next(iter(LineFile(path, offset)))
        file, positives, negatives = _parse_jsonl(path, text, line)
        signs = [sorted({position[name] for name in labels}) for labels in (positives, negatives)]
        return Row(image_name(options, file, line), tuple(signs[0]), tuple(signs[1]), line)

    rows, seen = Rows(row), dict[str, int]()
    for line, (offset, text) in enumerate(LineFile(path), start=1):
        if not text.strip():
            continue
        file, positives, negatives = _parse_jsonl(path, text, line)
        rows.append(offset, line, image_name(options, file, line))
        both = sorted(set(positives) & set(negatives))
        if both:
            raise DataError(f"{path} line {line}: class '{both[0]}' is positive and negative at once")
        for name in [*positives, *negatives]:
            seen.setdefault(name, line)
    names, position = class_places(options, declared, seen)
    return names, rows


def _parse_jsonl(path: Path, text: str, line: int) -> tuple[str, list[str], list[str]]:
    where = f"{path} line {line}"
    try:
        pairs = json.loads(text, object_pairs_hook=lambda pairs: pairs)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(f"{where} is no JSON: {reason}") from error
    if not text.lstrip().startswith("{"):
        raise DataError(f"{where} is no object with 'file', 'positives' and optionally 'negatives'")
    keys = [key for key, _ in pairs]
    absent = [key for key in _KEYS if key not in keys]
    for number, key in enumerate(keys):
        if key in keys[:number]:
            raise DataError(f"{where} has the key '{key}' twice")
        # other keys are the user's own business, unless one looks like a key that is not there
        if key not in _KEYS and nearest(key, absent):
            raise DataError(f"{where} has the key '{key}'{nearest(key, absent)}")
    record = {"negatives": [], **dict(pairs)}
    for key in _KEYS:
        if key not in record:
            raise DataError(f"{where} has no '{key}'")
        names = [record[key]] if key == "file" else record[key]
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise DataError(f"{where}: '{key}' is not {'a name' if key == 'file' else 'a list of class names'}")
    return record["file"], record["positives"], record["negatives"]
