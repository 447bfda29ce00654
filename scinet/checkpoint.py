"""Checkpoints: the selected weights as safetensors, and everything that resuming after any step needs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scinet.distributed import Ranks, first_rank_first
from scinet.errors import CheckpointError
from scinet.metering import Progress
from scinet.rundir import RunDirectory, write_text
from scinet.trainer import Trainer

_LATEST = "latest.json"


def save_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Write weights as safetensors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, str(temporary))
    os.replace(temporary, path)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read weights.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the run has not reached its first evaluation")
    try:
        return load_file(str(path))
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def load_into(network: nn.Module, path: Path) -> None:
    """Put weights into a network of the same configuration.

    Raises:
        CheckpointError: naming the first weight that does not fit.
    """
    state = load_weights(path)
    state.pop("steps", None)
    expected = network.state_dict()
    for name, value in expected.items():
        if name not in state:
            raise CheckpointError(f"{path} lacks the weight '{name}'")
        if state[name].shape != value.shape:
            raise CheckpointError(
                f"{path}: the weight '{name}' has shape {list(state[name].shape)}, the network expects "
                f"{list(value.shape)}; it comes from another backbone or class list"
            )
    network.load_state_dict({name: state[name] for name in expected})


def save_selected(run: RunDirectory, trainer: Trainer, class_names: Sequence[str], ranks: Ranks) -> None:
    """Write the best teacher and student, and the class names that their outputs stand for. Collective."""
    student = trainer.student_state()
    if ranks.is_first:
        (run.checkpoints / "selected").mkdir(parents=True, exist_ok=True)
        write_text(
            run.checkpoints / "selected" / "classes.json", json.dumps(list(class_names), ensure_ascii=False) + "\n"
        )
        save_weights(run.checkpoints / "selected" / "teacher.safetensors", trainer.teacher.state_dict())
        save_weights(run.checkpoints / "selected" / "student.safetensors", student)


def save_state(run: RunDirectory, trainer: Trainer, ranks: Ranks) -> None:
    """Write all that resuming needs; ``latest.json`` comes last and names it. Collective."""
    tag = f"step-{trainer.progress.step:08d}"
    trainer.engine.save(str(run.checkpoints), tag)
    state = trainer.state_dict()
    if not ranks.is_first:
        return
    save_weights(run.checkpoints / tag / "state.safetensors", state)
    latest = {"tag": tag, "world_size": ranks.world_size, "zero_stage": trainer.engine.zero_stage}
    latest |= {"progress": vars(trainer.progress)}
    previous = _read_latest(run)
    write_text(run.checkpoints / _LATEST, json.dumps(latest, indent=1) + "\n")
    if previous is not None and previous["tag"] != tag:
        shutil.rmtree(run.checkpoints / previous["tag"], ignore_errors=True)


def load_state(run: RunDirectory, trainer: Trainer, ranks: Ranks) -> bool:
    """Take up the latest state, and return whether there was one. Collective.

    Raises:
        CheckpointError: if it was written at another world size or ZeRO stage.
    """
    latest: dict[str, Any] | None = first_rank_first(lambda: _read_latest(run), ranks)
    if latest is None:
        return False
    for name, now in (("world_size", ranks.world_size), ("zero_stage", trainer.engine.zero_stage)):
        if latest[name] != now:
            raise CheckpointError(
                f"{run.path} was saved at {name.replace('_', ' ')} {latest[name]}, this start has {now}: "
                f"resume with {latest[name]}"
            )
    trainer.engine.load(str(run.checkpoints), latest["tag"])
    trainer.load_state_dict(load_weights(run.checkpoints / latest["tag"] / "state.safetensors"))
    trainer.progress = Progress(**latest["progress"])
    return True


def _read_latest(run: RunDirectory) -> dict[str, Any] | None:
    path = run.checkpoints / _LATEST
    if not path.is_file():
        return None
    try:
        latest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return latest
