"""Labels that a user already knows of images to be predicted (``scinet predict --known labels.csv``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scinet.data.formats.table_csv import read_csv
from scinet.data.formats.table_rows import TableOptions
from scinet.errors import ConfigError, DataError, nearest


class KnownLabels:
    """Rows of a label table, found by the image's path as it was named, or by its file name."""

    def __init__(self, path: Path, class_names: Sequence[str]) -> None:
        """Read the table: a file name, then 1 for present, 0 for absent or blank in a column for any of the classes.

        Raises:
            DataError: naming the column or row that does not fit.
            ConfigError: where there is no file, or a code can mean two things.
        """
        if not path.is_file():
            beside = [str(other) for other in path.parent.glob("*.csv")] if path.parent.is_dir() else []
            raise ConfigError(f"--known {path} does not exist{nearest(str(path), beside)}")
        names, rows = read_csv(TableOptions(labels=path, images=Path()), None)
        unknown = [name for name in names if name not in class_names]
        if unknown:
            raise DataError(f"{path}: column '{unknown[0]}' is no class of the run{nearest(unknown[0], class_names)}")
        repeated = rows.repeated()
        if repeated:
            raise DataError(f"{path} lines {repeated[0].line} and {repeated[1].line} are about '{repeated[0].file}'")
        places = [list(class_names).index(name) for name in names]
        self._path, self._num_classes = path, len(class_names)
        self._rows: dict[str, list[int]] = {}
        for number in range(len(rows)):
            row = rows[number]
            labels = [0] * len(class_names)
            for sign, own in ((1, row.positives), (-1, row.negatives)):
                for place in own:
                    labels[places[place]] = sign
            self._rows[row.file] = labels
        self._used: set[str] = set()

    def of(self, file: Path) -> list[int]:
        """Return the known labels [C] of an image, in {+1, -1, 0}; zeros where the table does not name it."""
        key = next((key for key in (str(file), file.name) if key in self._rows), None)
        if key is None:
            return [0] * self._num_classes
        self._used.add(key)
        return self._rows[key]

    def unused(self) -> str:
        """Return what to say of rows that no image has asked for, or nothing."""
        left = [key for key in self._rows if key not in self._used]
        if not left:
            return ""
        rows = f"{len(left)} of {len(self._rows)} rows of {self._path}"
        return f"{rows} name no image that was predicted, such as '{left[0]}'"
