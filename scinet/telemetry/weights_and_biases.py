"""Rows for Weights & Biases, offline into the run directory or online; a resumed run goes on as the same one there."""

from __future__ import annotations

import importlib
import os
import uuid
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scinet import rundir
from scinet.options import Options, WandbMode
from scinet.rundir import RunDirectory

PROJECT = "scinet"
_LONGEST_START_S, _LONGEST_END_S = 60.0, 15.0  # of its own patience with the network


def _package() -> Any:
    # it would report its own errors to its makers, from an offline run too
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    return importlib.import_module("wandb")


def missing() -> str:
    """Return what to do if the package is not there, or nothing."""
    try:
        is_there = hasattr(_package(), "init")  # a folder called wandb looks like an empty package
    except ImportError:
        is_there = False
    return "" if is_there else "telemetry.wandb=true needs the package wandb: pip install 'scinet[wandb]'"


class WeightsAndBiases:
    """One run there; its rows' steps only grow."""

    name = "Weights & Biases"

    def __init__(self, options: Options, directory: RunDirectory, num_told: int) -> None:
        """Begin the run, or go on with it; may wait for the network.

        Args:
            options: of the run.
            directory: of the run, which gets a folder ``wandb``.
            num_told: rows that come once more since the run was resumed, and are there already.
        """
        wandb, mode = _package(), options.telemetry.wandb_mode
        if mode is WandbMode.online and not wandb.login(prompt=False):
            raise RuntimeError("there is no login: run `wandb login`, or set telemetry.wandb_mode=offline")
        self._num_told = num_told
        settings = {
            "console": "off",
            "silent": True,
            "disable_git": True,
            "save_code": False,
            "init_timeout": _LONGEST_START_S,
            "finish_timeout": _LONGEST_END_S,
            "reinit": "create_new",
        }
        self._run = wandb.init(
            project=PROJECT,
            name=options.name,
            id=_identity(directory.path / "wandb" / "id"),
            dir=str(directory.path),
            mode=mode.value,
            resume="allow" if mode is WandbMode.online else None,
            config=OmegaConf.to_container(OmegaConf.structured(options), enum_to_str=True),
            settings=wandb.Settings(**settings),
        )

    def write(self, row: dict[str, Any]) -> None:
        """Log a row."""
        if self._num_told:
            self._num_told -= 1
            return
        self._run.log({name: value for name, value in row.items() if value is not None}, step=row["step"])

    def close(self, patience_s: float) -> None:
        """End the run there; `wandb sync` uploads what the package itself gives up."""
        self._run.finish()


def _identity(path: Path) -> str:
    """Return what the run is called there, made at its first start."""
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        rundir.write_text(path, uuid.uuid4().hex[:12])
    return path.read_text()
