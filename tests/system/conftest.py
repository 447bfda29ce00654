"""What the system tests share: commands inside this process, and a trained run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Launch = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class Result:
    """How a command that ran inside this process ended."""

    status: int
    out: str
    err: str


Call = Callable[..., Result]


@pytest.fixture(scope="session", autouse=True)
def _environment(own_environment: None) -> None:
    """Commands that run inside this process want it as much as those that are started."""


@pytest.fixture(scope="session")
def on_features(scenes: Path) -> tuple[str, ...]:
    """Overrides that train on cached features of the small data set, a step in a fraction of a second."""
    return (
        f"data.path={scenes}",
        "model.backbone=debug",
        "data.cached_variants=2",
        "data.cache_features=true",
        "model.freeze_image=true",
        "model.image_size=64",
    )


@pytest.fixture
def scinet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """``scinet("show", "--run", path)``: the console command, inside this process."""
    from scinet import cli

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["scinet", *(str(argument) for argument in arguments)])
        capsys.readouterr()
        status = cli.main()
        return Result(status, *capsys.readouterr())

    return call


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """``train("--config", path, "key=value")``: the training command, inside this process."""
    from scinet import running
    from scinet import train as command

    # DeepSpeed keeps the first group of a process: runs after it must not form another
    monkeypatch.setattr(running, "shut_down", lambda: None)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        status = command.main([str(argument) for argument in arguments])
        return Result(status, *capsys.readouterr())

    return call


@pytest.fixture
def own_scenes(scenes: Path, tmp_path: Path) -> Path:
    """A copy of the data set to damage."""
    return Path(shutil.copytree(scenes, tmp_path / "own-scenes"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, launch: Launch, small: tuple[str, ...]) -> Path:
    """A finished run of the embedded towers, started as the README says."""
    output = tmp_path_factory.mktemp("runs")
    words = (*small, "model.backbone=embedded", f"output={output}", "name=trained")
    done = launch("deepspeed", "scinet/train.py", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return output / "trained"
