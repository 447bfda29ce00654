"""The loop of ``scinet top``: look, draw, listen for a key."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.live import Live

from scinet import rundir
from scinet.errors import CheckpointError, ScinetError
from scinet.options import Options
from scinet.rundir import RunDirectory
from scinet.top.screen import screen
from scinet.top.watch import Look, Watch

_WIDTH_OF_A_FILE = 250
_RUNS_AT_ONCE = 16


def top(paths: Sequence[Path], *, folder: Path, interval_s: float, once: bool) -> None:
    """Show runs until q or Ctrl-C, or once where standard output is no terminal.

    Args:
        paths: run directories; none: all in ``folder``.
        folder: of run directories.
        interval_s: between two looks.
        once: whether one look is enough.

    Raises:
        ScinetError: if none of the paths is a run.
    """
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=_WIDTH_OF_A_FILE)
    board = _Board(paths, folder)
    with contextlib.suppress(KeyboardInterrupt):
        if once or not console.is_terminal:
            console.print(screen(*board.look(), console))
            return
        with _keys() as is_over, Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                started = time.monotonic()
                live.update(screen(*board.look(), console), refresh=True)
                if is_over(max(0.0, started + interval_s - time.monotonic())):
                    return


class _Board:
    """The runs that are shown; in a folder, those that come later too."""

    def __init__(self, paths: Sequence[Path], folder: Path) -> None:
        self._paths, self._folder = list(dict.fromkeys(paths)), folder
        self._watches: dict[Path, Watch] = {}
        self._early: set[Path] = set()
        self._find()

    def _find(self) -> list[str]:
        """Take up all runs that are there, and return what is to be said of the other paths."""
        paths = self._paths or [path for path in sorted(self._folder.glob("*")) if _may_be_run(RunDirectory(path))]
        errors: list[ScinetError] = []
        for path in paths:
            if path in self._watches and path not in self._early:
                continue
            try:
                self._watches[path] = Watch(*rundir.find(path))
                self._early.discard(path)
            except ScinetError as error:
                # until all that may be refused has been accepted, a run has no configuration
                if _may_be_run(run := RunDirectory(path)) and not run.config.exists():
                    self._watches[path] = Watch(run, Options())
                    self._early.add(path)
                else:
                    errors.append(error)
            except (OSError, ValueError) as error:
                errors.append(CheckpointError(f"{path} cannot be read: {error}"))
        if not self._watches:
            raise errors[0] if errors else CheckpointError(f"there is no run in {self._folder}: name one")
        return [f"not shown: {error}" for error in errors]

    def look(self) -> tuple[list[Look], list[str]]:
        """Look at all runs at once; those that live come first."""
        others = self._find()
        with ThreadPoolExecutor(_RUNS_AT_ONCE) as pool:
            looks = list(pool.map(Watch.look, self._watches.values()))
        names = Counter(look.name for look in looks)
        looks = [
            replace(look, name="/".join(path.absolute().parts[-2:])) if names[look.name] > 1 else look
            for path, look in zip(self._watches, looks, strict=True)
        ]
        return sorted(looks, key=lambda look: not look.state.is_alive), others


def _may_be_run(run: RunDirectory) -> bool:
    return run.config.is_file() or run.lock.is_file()


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Take single keys from standard input, if that is a terminal, and leave it as it was."""
    if not sys.stdin.isatty():
        yield _sleep
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield _is_over
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _is_over(seconds: float) -> bool:
    """Wait, and return whether q was pressed or the terminal has gone."""
    end = time.monotonic() + seconds
    while (left_s := end - time.monotonic()) > 0:
        if select.select([sys.stdin], [], [], left_s)[0]:
            key = os.read(sys.stdin.fileno(), 1)
            if key in (b"q", b"Q", b""):
                return True
    return False


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False
