"""The lines of a text with the place of each in the file, so that one can be read again without those before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from scinet.errors import DataError

_MARK = b"\xef\xbb\xbf"


class LineFile:
    """Iterates over (offset, text) of the lines of a UTF-8 file; ``offset`` is where the next line begins."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        """Begin at an offset."""
        self._path, self.offset = path, offset

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Yield the lines with their ends.

        Raises:
            DataError: if the file is not UTF-8.
        """
        with self._path.open("rb") as file:
            file.seek(self.offset)
            for content in file:
                start = self.offset
                self.offset += len(content)
                try:
                    yield start, (content if start else content.removeprefix(_MARK)).decode()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{self._path} is not UTF-8 (byte {start + error.start}): save it as UTF-8"
                    ) from error
