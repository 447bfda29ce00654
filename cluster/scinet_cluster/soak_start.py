"""One start of a training run under ``scinet-launch``, as a soak sees it: its processes, its words and its step."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from scinet.errors import TrainingError
from scinet_cluster import faults
from scinet_cluster.faults import MARK

LOOKS_EVERY_S = 0.02
_TAIL_BYTES = 8192


class Start:
    """A started run; on leaving it nothing of it lives any longer."""

    def __init__(self, words: Sequence[str], run: Path, *, ranks: int, grace_s: float) -> None:
        """Start it, or go on with it.

        Args:
            words: script and arguments; the run's name is added.
            run: its directory.
            ranks: how many.
            grace_s: from SIGTERM to SIGKILL.
        """
        self.mark = secrets.token_hex(8)
        options = ("--ranks-per-node", str(ranks), "--grace", str(grace_s))
        training = (*words, f"name={run.name}", "--resume", "auto")
        # through a pipe: on a full disk a log would be lost too
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scinet_cluster.launch", *options, "--", *training],
            env={**os.environ, MARK: self.mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.launcher = self._process.pid
        self._lines: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        self._lines.extend(self._process.stdout)

    def __enter__(self) -> Start:
        """Return it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill what is left."""
        faults.kill_all(self.mark)
        self._process.wait()

    @property
    def text(self) -> str:
        """All that it has said."""
        return "".join(self._lines)

    @property
    def verdict(self) -> str:
        """The last error that it has told, or the last line."""
        lines = [line.strip() for line in self._lines]
        return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")

    @property
    def is_running(self) -> bool:
        """Whether its launcher is."""
        return self._process.poll() is None

    def await_text(self, text: str, patience_s: float) -> None:
        """Return when it says something or has ended, or the time is over."""
        end = time.monotonic() + patience_s
        while self.is_running and text not in self.text and time.monotonic() < end:
            time.sleep(LOOKS_EVERY_S)

    def wait(self, patience_s: float) -> int:
        """Return the launcher's exit status once it and all that it started have ended.

        Raises:
            TrainingError: if that takes longer.
        """
        end = time.monotonic() + patience_s
        while self.is_running or faults.processes(self.mark).everyone:
            if time.monotonic() > end:
                left = len(faults.processes(self.mark).everyone)
                raise TrainingError(f"{left} of its processes have not ended within {patience_s:.0f} s:\n{self.text}")
            time.sleep(LOOKS_EVERY_S)
        self._listener.join()
        return self._process.returncode


def step_of(run: Path) -> int:
    """Return the step of the last row of a run's ``metrics.jsonl``, 0 without one."""
    with contextlib.suppress(OSError, IndexError), (run / "metrics.jsonl").open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
        whole_lines = file.read().split(b"\n")[:-1]
        return int(json.loads(whole_lines[-1])["step"])
    return 0
