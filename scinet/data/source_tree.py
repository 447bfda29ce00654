"""Finding the files of an official raw layout below the user's folder, or inside the archives that lie there."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path

from scinet.data.archives import Archive, open_member
from scinet.data.records import ImageSource, check_folder, file_source
from scinet.errors import DataError, nearest

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
_MAX_LINE = 64 * 2**20  # characters; a longer line is no text file of any collection
_MIN_BOMB_BYTES = 64 * 2**20
_MAX_UNPACKED_RATIO = 50  # images hardly compress: a tar.gz that grows more is a bomb


class SourceTree:
    """Read access to a source folder: plain files first, then the archives directly in it, in the order of their names.

    What is asked for are relative names with ``/``; one that is absolute or climbs with ``..`` is never found, since
    such names come out of the collections' own lists.
    """

    def __init__(self, root: Path, scratch: Path) -> None:
        """Look at a folder.

        Args:
            root: the user's folder.
            scratch: where a compressed tar, which cannot be read at random, is unpacked to a plain tar.

        Raises:
            ConfigError: if the folder does not exist.
        """
        check_folder(root, "source folder")
        self.root, self._scratch = root, scratch
        self._archives: list[Archive] | None = None

    @property
    def archives(self) -> list[Archive]:
        """The archives of the folder; they are indexed when the first is needed."""
        if self._archives is None:
            names = sorted(name for name in os.listdir(self.root) if name.lower().endswith(_ARCHIVES))
            files = [self.root / name for name in names if (self.root / name).is_file()]
            self._archives = [Archive(self._plain_archive(path)) for path in files]
        return self._archives

    def _plain_archive(self, path: Path) -> Path:
        if not path.name.lower().endswith((".tar.gz", ".tgz")):
            return path
        target = self._scratch / f"{path.name.removesuffix('.gz').removesuffix('.tgz')}-{path.stat().st_mtime_ns}.tar"
        if not target.is_file():
            _gunzip(path, target)
        return target

    def find(self, *candidates: str) -> ImageSource | None:
        """Return the first of the names that is there."""
        names = [name for name in candidates if not _climbs(name)]
        for name in names:
            path = self.root / name
            try:
                status = os.stat(path)
            except (OSError, ValueError):
                continue
            if stat.S_ISREG(status.st_mode):
                return file_source(str(path), status)
        for archive in self.archives:
            for name in names:
                found = archive.find(name)
                if found is not None:
                    return found
        return None

    def require(self, what: str, *candidates: str, archive: str = "", remedy: str = "") -> ImageSource:
        """Return the first of the names that is there.

        Args:
            what: what it is, for the message.
            candidates: names, the official one first.
            archive: the official archive that holds it.
            remedy: ends the message.

        Raises:
            DataError: naming what was expected, and the nearest that is there.
        """
        found = self.find(*candidates)
        if found is None:
            inside = f", there or in {archive}" if archive else ""
            hint = self._hint(candidates)
            raise DataError(f"{what} is missing in {self.root}: expected {candidates[0]}{inside}{hint}{remedy}")
        return found

    def split_files(
        self, candidates: dict[str, tuple[str, ...]], archives: dict[str, str], *, skip_missing: bool
    ) -> dict[str, ImageSource]:
        """Return the list of each split; without a split whose list is missing, if that is asked for.

        Args:
            candidates: names by split, the official one first.
            archives: the official archive by split.
            skip_missing: leave out a split that is missing, as long as there is another.

        Raises:
            DataError: naming what was expected.
        """
        found = {split: self.find(*names) for split, names in candidates.items()}
        for split, names in candidates.items():
            if found[split] is None and not (skip_missing and any(found.values())):
                without = f"; `--missing skip` builds without the {split} split" if any(found.values()) else ""
                self.require(f"the list of {split} images", *names, archive=archives[split], remedy=without)
        return {split: file for split, file in found.items() if file is not None}

    def _hint(self, candidates: tuple[str, ...]) -> str:
        """Say where else a candidate lies, or return the nearest name in the deepest folder of one that exists."""
        beside = [entry for _, entry in zip(range(2000), sorted(self.root.iterdir()), strict=False) if entry.is_dir()]
        for folder in (self.root.parent, *beside):
            for name in candidates:
                if not _climbs(name) and (folder / name).is_file():
                    return f"; {folder / name} is there: give --source {folder}"
        for name in candidates:
            folder, wanted = (self.root / name).parent, self.root / name
            while folder != self.root and not folder.is_dir():
                folder, wanted = folder.parent, wanted.parent
            hint = nearest(wanted.name, [entry for _, entry in zip(range(2000), os.listdir(folder), strict=False)])
            if hint and wanted.name not in hint:
                return hint
        return ""

    def lines(self, source: ImageSource) -> Iterator[str]:
        """Yield the lines of a text, without their ends.

        Raises:
            DataError: if it is not UTF-8 or damaged.
        """
        with open_text(source) as text:
            while True:
                try:
                    line = text.readline(_MAX_LINE)
                except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
                    raise DataError(f"{source} cannot be read as a text in UTF-8: {error}") from error
                if not line:
                    return
                if len(line) == _MAX_LINE:
                    raise DataError(f"{source} has a line of more than {_MAX_LINE} characters: it is no list")
                yield line.rstrip("\r\n")

    def words(self, source: ImageSource) -> list[list[str]]:
        """Return the words of each line that holds any."""
        return [line.split() for line in self.lines(source) if line.strip()]


def open_text(source: ImageSource) -> io.TextIOWrapper:
    """Open a text in UTF-8, unpacking a ``.gz``."""
    stream = open_member(source)
    if (source.member or source.path).endswith(".gz"):
        return io.TextIOWrapper(gzip.GzipFile(fileobj=stream), encoding="utf-8-sig")
    return io.TextIOWrapper(stream, encoding="utf-8-sig")


def _climbs(name: str) -> bool:
    return name.startswith("/") or not name or ".." in name.split("/") or "\0" in name


def _gunzip(path: Path, target: Path) -> None:
    """Unpack a compressed tar to a plain one that can be read at random."""
    packed = path.stat().st_size
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < packed:
        raise DataError(
            f"{path} must be unpacked to be read at random, which needs more than its {packed} bytes beside the "
            f"target, where {free} are free: make room, or unpack it yourself"
        )
    temporary = target.with_name(f"{target.name}.part")
    written = 0
    try:
        with gzip.open(path, "rb") as packed_file, temporary.open("wb") as plain:
            while chunk := packed_file.read(2**20):
                written += len(chunk)
                if written > max(_MIN_BOMB_BYTES, _MAX_UNPACKED_RATIO * packed):
                    raise DataError(f"{path} unpacks its {packed} bytes to more than {written}: a decompression bomb")
                plain.write(chunk)
        temporary.rename(target)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"archive {path} cannot be read: {error}; download it again, or move it out of the source folder"
        ) from error
    except OSError as error:
        raise DataError(f"unpacking {path} to {target} failed: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
