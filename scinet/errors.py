"""The errors a user can cause, each with the exit status its command ends with (design.md, conventions 4)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from scinet.texttable import printable

FIRST_CURABLE = 128  # from this exit status on, starting again helps
_LONGEST_SENTENCE = 2000


class ScinetError(Exception):
    """A failure the user can act on: one sentence that names what was given, what is required and what to do."""

    exit_status = 1
    is_told = False  # whether another rank has said it, or failed before

    def __str__(self) -> str:
        """Return the sentence; its words may come from a stranger's file, so no terminal obeys them."""
        return printable(super().__str__(), limit=_LONGEST_SENTENCE)


class ConfigError(ScinetError):
    """The command or its configuration cannot be carried out as written (exit status 2)."""

    exit_status = 2


class DataError(ScinetError):
    """A shard, an image, a label file or a data card is not what it should be."""


class BuildInterrupted(ScinetError):
    """Ctrl-C ended a build; what it has finished is kept (exit status 130)."""

    exit_status = 130


class CheckpointError(ScinetError):
    """A run directory or a checkpoint is missing, incomplete or belongs to another run."""


class TrainingError(ScinetError):
    """Training cannot go on, for instance because the loss is not finite."""


class PeerLost(ScinetError):
    """Another rank was killed, cannot be reached or hangs: the same command with ``--resume auto`` goes on."""

    exit_status = 142  # 128 + SIGALRM


class LoaderLost(DataError):
    """A loader process was killed, as a machine does that runs out of memory: starting again goes on."""

    exit_status = PeerLost.exit_status


class Preempted(ScinetError):
    """SIGTERM ended the run: the same command with ``--resume auto`` goes on."""

    exit_status = 143  # 128 + SIGTERM, what shells report of a process that it ended


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known spelling nearest to ``word``, or an empty string."""
    candidates = [candidate for candidate in known if candidate != word]
    match = [same for same in candidates if same.lower() == word.lower()][:1]
    match = match or difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    if not match:
        lowered = {candidate.lower(): candidate for candidate in candidates}
        match = [lowered[found] for found in difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=0.5)]
    return f"; did you mean '{match[0]}'?" if match else ""
