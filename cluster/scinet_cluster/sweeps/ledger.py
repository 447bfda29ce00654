"""What became of a sweep's trials: ``trials.jsonl``, from which a sweep that was killed goes on.

Ray's own record of an experiment is a pickle, which runs whatever a stranger put into it; this is JSON, and readable.
"""

from __future__ import annotations

import enum
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scinet.errors import ConfigError


class Purpose(enum.Enum):
    """Why a trial runs: to find something better, or to see whether that holds with another seed."""

    search = "search"
    confirm = "confirm"


class State(enum.Enum):
    """Where a trial stands; ``begun`` after the sweep's end means that it was interrupted."""

    begun = "begun"
    completed = "completed"
    stopped = "stopped"
    failed = "failed"


@dataclass
class Trial:
    """One training of a sweep.

    Attributes:
        number: from 0, the default; its run is ``trials/<number>``.
        purpose: why it runs.
        confirms: for a confirmation, the trial whose parameters it has; otherwise its own number.
        seed: of the training.
        parameters: by option.
        state: where it stands.
        history: (finished epochs, hold-out mAP) of each evaluation.
        reason: why it failed, in words.
        seconds: since it was first begun by the sweep that ended it.
        placed: rank, host and device of each of its ranks.
    """

    number: int
    purpose: Purpose
    confirms: int
    seed: int
    parameters: dict[str, Any]
    state: State = State.begun
    history: list[tuple[int, float]] = field(default_factory=list)
    reason: str = ""
    seconds: float = 0.0
    placed: list[tuple[int, str, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of its run."""
        return f"{self.number:04d}"

    @property
    def best(self) -> float | None:
        """The highest hold-out mAP of its epochs, None before the first evaluation."""
        return max((value for _, value in self.history), default=None)

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing left to do."""
        return self.state is not State.begun

    def note(self, epoch: int, holdout_map: float) -> None:
        """Add an evaluation, unless a trial that was started again tells it once more."""
        if epoch not in (known for known, _ in self.history):
            self.history.append((epoch, holdout_map))


class Ledger:
    """The trials of a sweep by number; the last line of a number holds."""

    def __init__(self, path: Path) -> None:
        """Read what there is; a last line that a kill cut off is left out."""
        self._path = path
        self.trials: dict[int, Trial] = {}
        if path.is_file():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                os.truncate(path, len(whole))
            for line in whole.splitlines():
                trial = _read(path, line)
                self.trials[trial.number] = trial

    def write(self, trial: Trial) -> None:
        """Keep a trial as it is now, on the disk before this returns."""
        self.trials[trial.number] = trial
        row = asdict(trial) | {"purpose": trial.purpose.value, "state": trial.state.value}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def of(self, purpose: Purpose) -> list[Trial]:
        """Return the trials of a purpose in the order of their numbers."""
        return [trial for _, trial in sorted(self.trials.items()) if trial.purpose is purpose]


def _read(path: Path, line: bytes) -> Trial:
    try:
        row = json.loads(line)
        row["purpose"], row["state"] = Purpose(row["purpose"]), State(row["state"])
        row["history"] = [(int(epoch), float(value)) for epoch, value in row["history"]]
        row["placed"] = [(int(rank), str(host), str(device)) for rank, host, device in row["placed"]]
        return Trial(**row)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} has a line that no sweep wrote ({line[:80]!r}): {error}") from error
