"""The selected weights as safetensors: what evaluation, prediction and a user take away."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scinet.distributed import Ranks
from scinet.errors import CheckpointError
from scinet.rundir import RunDirectory, write_text
from scinet.trainer import Trainer

BANK = "bank.safetensors"
"""Beside the selected weights: what the fused classifier is made of."""


def save_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Write weights as safetensors, whole or not at all.

    Raises:
        CheckpointError: if they cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, str(temporary))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} cannot be written ({error}): what was saved before stays; make room, then the same command with "
            "--resume auto goes on"
        ) from error


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
    student, teacher = trainer.student_weights(), trainer.teacher_weights()
    if ranks.is_first:
        (run.checkpoints / "selected").mkdir(parents=True, exist_ok=True)
        write_text(
            run.checkpoints / "selected" / "classes.json", json.dumps(list(class_names), ensure_ascii=False) + "\n"
        )
        save_weights(run.checkpoints / "selected" / "teacher.safetensors", teacher)
        save_weights(run.checkpoints / "selected" / "student.safetensors", student)
