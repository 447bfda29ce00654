"""The folder ``.NAME.building`` in which a data set is made before it appears under its name."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scinet.data.shards import write_json
from scinet.errors import ConfigError


class Workshop:
    """What a build leaves between two tries: the lock, the plan, reports of finished shards, and the shards.

    Attributes:
        out: the target.
        whole: becomes the target.
        reports: one sidecar a finished shard.
        plan: the plan's files.
        scratch: unpacked archives.
    """

    def __init__(self, out: Path, folder: Path) -> None:
        """Name the parts."""
        self.out, self.folder = out, folder
        self.whole, self.reports, self.plan, self.scratch = (
            folder / part for part in ("whole", "reports", "plan", "scratch")
        )
        self._is_kept = False

    @classmethod
    @contextlib.contextmanager
    def open(cls, out: Path, *, restart: bool) -> Iterator[Workshop]:
        """Make or find the folder and hold its lock; on the way out it goes, unless something in it is worth keeping.

        Raises:
            ConfigError: if ``out`` holds something, cannot be written, or another process is building it.
        """
        # a link to an empty folder, on a larger disk, leads there
        out = out.resolve()
        if out == Path.cwd():
            raise ConfigError(f"--out is the folder that you are in, {out}: name one below it")
        _check_target(out)
        folder = out.parent / f".{out.name}.building"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise ConfigError(f"cannot write to {out.parent}: {error.strerror}") from error
        try:
            _lock(lock, folder, out)
            _check_target(out)  # the one who held the lock may just have finished
            workshop = cls(out, folder)
            if restart:
                workshop._clear()
            for part in (workshop.whole, workshop.reports, workshop.plan, workshop.scratch):
                part.mkdir(exist_ok=True)
            workshop._is_kept = workshop._num_finished() > 0
            try:
                yield workshop
            finally:
                if not workshop._is_kept:
                    shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)

    def claim(self, options: dict[str, Any]) -> None:
        """Go on with what lies here, if it was begun with the same options.

        Raises:
            ConfigError: if shards were finished with other options.
        """
        path = self.folder / "options.json"
        options = json.loads(json.dumps(options))
        begun = _read_options(path) if path.is_file() else options
        if begun != options and self._num_finished():
            changed = ", ".join(sorted(key for key in options if options[key] != begun.get(key)))
            raise ConfigError(
                f"{self.folder} holds {self._num_finished()} shards of an unfinished build with another choice of "
                f"{changed}: give the same options to go on with it, or --restart to begin anew"
            )
        write_json(path, options)

    def sidecar(self, file: str) -> Path:
        """Return where the report of a shard goes."""
        return self.reports / f"{file}.json"

    def keep(self) -> None:
        """Leave the folder for the next try."""
        self._is_kept = True

    def sweep(self, files: set[str]) -> None:
        """Remove what belongs to no shard of the plan: parts that a killed build left, shards of another plan."""
        for path in self.whole.iterdir():
            if path.name not in files:
                path.unlink()
        for path in self.reports.iterdir():
            if path.name.removesuffix(".json") not in files:
                path.unlink()

    def what_is_left(self) -> str:
        """Return the end of a sentence about a build that did not finish."""
        if not self._is_kept:
            return "nothing was left behind"
        kept, number = f"are kept in {self.folder}: the same command goes on with them", self._num_finished()
        return f"{number} finished shards {kept}" if number else f"no shard was finished; {self.folder} can be removed"

    def finish(self) -> None:
        """Let the target appear."""
        flush_folder(self.whole)
        if self.out.exists():
            self.out.rmdir()
        self.whole.rename(self.out)
        flush_folder(self.out.parent)
        self._is_kept = False

    def _num_finished(self) -> int:
        return sum(1 for path in self.reports.iterdir() if path.suffix == ".json")

    def _clear(self) -> None:
        for part in (self.whole, self.reports, self.plan, self.scratch):
            shutil.rmtree(part, ignore_errors=True)


def _read_options(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        return {}  # damaged: every choice counts as another one


def _check_target(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: name a folder with --out")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} exists and is not empty: name another folder with --out, or remove it")


def _lock(lock: int, folder: Path, out: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = os.fstat(lock).st_ino == os.stat(folder / "lock").st_ino
    except OSError:
        is_ours = False  # held, or removed together with the folder by the one who held it
    if not is_ours:
        raise ConfigError(f"another process is building {out}: wait for it, or name another folder with --out")


def flush_folder(path: Path) -> None:
    """Return when a folder's names are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
