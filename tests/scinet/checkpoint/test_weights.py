"""The selected weights: whole or not at all, and taken only by a network that they fit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from scinet.checkpoint import weights
from scinet.distributed import Ranks
from scinet.errors import CheckpointError
from scinet.rundir import RunDirectory

CPU = torch.device("cpu")


class _Trained:
    def student_weights(self) -> dict[str, torch.Tensor]:
        return {"w": torch.tensor([1.0])}

    def teacher_weights(self) -> dict[str, torch.Tensor]:
        return {"w": torch.tensor([2.0])}


def test_teacher_student_and_class_names_are_kept_each_under_its_name(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    weights.save_selected(run, cast(Any, _Trained()), ("cat", "owl é"), Ranks(1, 2, CPU))
    assert not run.checkpoints.exists(), "the first rank writes"
    weights.save_selected(run, cast(Any, _Trained()), ("cat", "owl é"), Ranks(0, 2, CPU))
    folder = run.checkpoints / "selected"
    assert json.loads((folder / "classes.json").read_text(encoding="utf-8")) == ["cat", "owl é"]
    assert weights.load_weights(folder / "student.safetensors")["w"].item() == 1
    assert weights.load_weights(folder / "teacher.safetensors")["w"].item() == 2


def test_weights_are_flushed_before_they_take_the_place_of_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = tmp_path / "w.safetensors", []
    weights.save_weights(path, {"w": torch.tensor([1.0])})
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("flush"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda one, other: (done.append("rename"), replace(one, other)))
    weights.save_weights(path, {"w": torch.tensor([3.0])})
    assert done == ["flush", "rename"]
    assert weights.load_weights(path)["w"].item() == 3

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        weights.save_weights(path, {"w": torch.tensor([4.0])})
    assert weights.load_weights(path)["w"].item() == 3
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_network_takes_weights_that_fit_and_names_what_does_not(tmp_path: Path) -> None:
    path, network = tmp_path / "w.safetensors", nn.Linear(2, 3)
    state = {name: torch.full_like(value, 5) for name, value in network.state_dict().items()}
    weights.save_weights(path, {**state, "of another head": torch.zeros(1)})
    weights.load_into(network, path)
    assert all((value == 5).all() for value in network.state_dict().values())
    with pytest.raises(CheckpointError, match=r"'weight' has shape \[3, 2\], the network expects \[4, 2\]"):
        weights.load_into(nn.Linear(2, 4), path)
    weights.save_weights(path, {"weight": state["weight"]})
    with pytest.raises(CheckpointError, match="lacks the weight 'bias'"):
        weights.load_into(network, path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="is damaged"):
        weights.load_into(network, path)
    with pytest.raises(CheckpointError, match="has not reached its first evaluation"):
        weights.load_into(network, tmp_path / "none")
