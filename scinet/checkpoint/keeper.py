"""Checkpoints of a run: written beside the training, kept by policy, and the newest whole one found again.

Every rank copies its pieces and goes on training while a thread writes them to ``.step-N.part/``; when all have, the
first rank's thread adds the manifest, renames the folder to ``step-N`` and, last, lets ``latest.json`` name it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from scinet.checkpoint import files, pieces
from scinet.checkpoint.files import Written
from scinet.distributed import Ranks, from_first_rank, gather_objects
from scinet.errors import CheckpointError
from scinet.notes import Notes
from scinet.options import CheckpointOptions
from scinet.rundir import RunDirectory, write_text
from scinet.telemetry.observer import Observer
from scinet.trainer import Trainer

_LATEST = "latest.json"
_FORMAT = 1
_LOOKS_PER_S = 20

_log = logging.getLogger(__name__)


@dataclass
class _Job:
    """One checkpoint on its way to the disk."""

    tag: str
    number: int
    tensors: dict[str, Tensor]
    content: dict[str, Any]
    begun_s: float


class Keeper:
    """Writes and reads the checkpoints of one run."""

    def __init__(
        self,
        run: RunDirectory,
        options: CheckpointOptions,
        ranks: Ranks,
        *,
        patience_s: float,
        notes: Notes,
        observer: Observer | None = None,
    ) -> None:
        """Take the run's folder.

        Args:
            run: whose checkpoints they are.
            options: how many are kept.
            ranks: this process.
            patience_s: longest wait for the other ranks' pieces.
            notes: through which the ranks' threads tell each other how they fare.
            observer: told how long checkpoints take; on the first rank, whose thread completes them.
        """
        self._folder, self._options, self._ranks, self._notes = run.checkpoints, options, ranks, notes
        self._patience_s, self._observer = patience_s, observer or Observer()
        self._numbers = count()
        self._thread: threading.Thread | None = None
        self.stalled_s = 0.0

    def save(self, trainer: Trainer) -> None:
        """Copy the training state and begin to write it; waits for the previous one first. Collective."""
        started = time.monotonic()
        self.wait()
        state = trainer.state()
        content = {
            "format": _FORMAT,
            "world_size": self._ranks.world_size,
            "zero_stage": trainer.engine.zero_stage,
            "tensors": {part.name: list(part.shape) for part in state.parts},
            "state": state.scalars,
        }
        tensors = pieces.own(state.parts, self._ranks)
        job = _Job(_tag(trainer.progress.step), next(self._numbers), tensors, content, time.monotonic())
        # a daemon: a process that fails does not wait for ranks that failed before it
        self._thread = threading.Thread(target=self._carry_out, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()
        seconds = time.monotonic() - started
        self.stalled_s += seconds
        self._observer.stalled(seconds)

    def wait(self) -> None:
        """Return when the last checkpoint is written, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def load(self, trainer: Trainer, say: Callable[[str], None]) -> bool:
        """Take up the newest whole checkpoint, and return whether there was one. Collective.

        Args:
            trainer: of the same configuration, at any number of ranks and ZeRO stage.
            say: told about each damaged one that is passed over.

        Raises:
            CheckpointError: if there are some, but none is whole, or it belongs to another network.
        """
        tags = from_first_rank(self._find, self._ranks)
        for tag in tags:
            content, damage = self._examine(tag)
            if damage is None:
                self._restore(trainer, tag, content)
                return True
            say(f"checkpoint {self._folder / tag} is damaged ({damage}): taking the one before")
        if tags:
            raise CheckpointError(
                f"none of the {len(tags)} checkpoints in {self._folder} is whole: remove the folder to begin anew, or "
                "put back a copy"
            )
        return False

    def _find(self) -> list[str]:
        """Return the checkpoints, the one that ``latest.json`` names first, then the newest ones before it."""
        for left in self._folder.glob(".step-*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        tags = sorted((path.name for path in self._folder.glob("step-*") if path.is_dir()), reverse=True)
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            latest = json.loads((self._folder / _LATEST).read_text(encoding="utf-8"))["tag"]
            if latest in tags:
                return [latest, *(tag for tag in tags if tag != latest)]
        return tags

    def _examine(self, tag: str) -> tuple[dict[str, Any], str | None]:
        """Return a checkpoint's manifest and what is wrong with it; each rank checks its share of files. Collective."""

        def read() -> tuple[dict[str, Any], list[Written], str | None]:
            try:
                return *files.read_manifest(self._folder / tag), None
            except CheckpointError as error:
                return {}, [], str(error)

        content, parts, damage = from_first_rank(read, self._ranks)
        mine = parts[self._ranks.rank :: self._ranks.world_size]
        found = [files.check(self._folder / tag, part) for part in mine]
        damages = [damage, *gather_objects([next(filter(None, found), None)], self._ranks)]
        return {**content, "parts": parts}, next(filter(None, damages), None)

    def _restore(self, trainer: Trainer, tag: str, content: dict[str, Any]) -> None:
        where = self._folder / tag
        try:
            reader = pieces.Reader(where / part.name for part in content["parts"])
            state = trainer.state()
            shapes = content["tensors"]
            for part in state.parts:
                if part.name in shapes and list(part.shape) != shapes[part.name]:
                    raise CheckpointError(
                        f"'{part.name}' has shape {shapes[part.name]}, this run has {list(part.shape)}"
                    )
                reader.fill(part)
            state.settle(content["state"])
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            reason = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"{where} was not made by this configuration and version of scinet: {reason}"
            ) from error

    def _carry_out(self, job: _Job) -> None:
        """Write this rank's pieces and, on the first rank, complete the checkpoint."""
        folder = self._folder / f".{job.tag}.part"
        name = f"part-{self._ranks.rank:05d}-of-{self._ranks.world_size:05d}.safetensors"
        try:
            folder.mkdir(exist_ok=True)
            outcome: list[Any] = list(files.write_tensors(folder / name, job.tensors))
        except OSError as error:
            outcome = [f"rank {self._ranks.rank}: {error.strerror}"]
        job.tensors.clear()
        self._notes.put(_key(job, self._ranks.rank), json.dumps(outcome))
        if self._ranks.is_first:
            failure = self._complete(folder, job)
            self._observer.checkpoint(time.monotonic() - job.begun_s, is_written=failure is None)
            if failure:
                shutil.rmtree(folder, ignore_errors=True)
                _log.warning("checkpoint %s was not written (%s): the previous one stays", job.tag, failure)

    def _complete(self, folder: Path, job: _Job) -> str | None:
        """Wait for the other ranks' pieces and make the checkpoint the latest; return why it failed."""
        outcomes = []
        deadline = time.monotonic() + self._patience_s
        for rank in range(self._ranks.world_size):
            while (note := self._notes.get(_key(job, rank))) is None:
                if time.monotonic() > deadline:
                    return f"rank {rank} did not finish its part in {self._patience_s:g} s"
                time.sleep(1 / _LOOKS_PER_S)
            outcomes.append(json.loads(note))
        failed = [outcome[0] for outcome in outcomes if len(outcome) == 1]
        if failed:
            return str(failed[0])
        try:
            files.write_manifest(folder, job.content, [Written(*outcome) for outcome in outcomes])
            files.flush_folder(folder)
            self._rename(folder, self._folder / job.tag)
            write_text(self._folder / _LATEST, json.dumps({"tag": job.tag}) + "\n")
            self._prune(job.tag)
        except OSError as error:
            return str(error.strerror)
        return None

    def _rename(self, folder: Path, target: Path) -> None:
        """Give a whole checkpoint its name; one of the same step is damaged or of the same content."""
        old = target.with_name(f".{target.name}.old")
        if target.exists():
            os.replace(target, old)
        os.replace(folder, target)
        files.flush_folder(self._folder)
        shutil.rmtree(old, ignore_errors=True)

    def _prune(self, newest: str) -> None:
        """Remove what the policy does not keep among the checkpoints up to the newest one."""
        options = self._options
        tags = sorted(path.name for path in self._folder.glob("step-*") if path.name <= newest)
        kept = set(tags[-options.keep_last :])
        if options.keep_every_steps:
            kept |= {tag for tag in tags if int(tag.rpartition("-")[2]) % options.keep_every_steps == 0}
        if options.keep_best:
            kept |= set(sorted(tags, key=self._holdout_map)[-options.keep_best :])
        for tag in set(tags) - kept:
            shutil.rmtree(self._folder / tag, ignore_errors=True)

    def _holdout_map(self, tag: str) -> float:
        """Return the hold-out mAP of the weights in a checkpoint; -1 where they were not judged."""
        try:
            progress = files.read_manifest(self._folder / tag)[0]["state"]["progress"]
        except CheckpointError:
            return -1.0
        return float(progress["last_map"]) if progress["epoch"] == progress["judged"] else -1.0


def _tag(step: int) -> str:
    return f"step-{step:010d}"


def _key(job: _Job, rank: int) -> str:
    return f"checkpoint/{job.tag}/{job.number}/{rank}"
