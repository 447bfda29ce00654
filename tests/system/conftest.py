"""What the system tests share, made once a session: a cache, a data set and a trained run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
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
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this session's own, one thread a process, and the repository root as the current folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="session")
def launch() -> Launch:
    """``launch("torchrun", ...)``: run a command to its end, with standard output and error apart."""

    def run(*command: object, timeout_s: int = 300) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        # what a run inside this process has set for DeepSpeed is not the launcher's business
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        return subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment
        )

    return run


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
    import torch.distributed as dist

    from scinet import distributed, running
    from scinet import train as command

    # DeepSpeed keeps the first group of a process: runs after it must not form another
    monkeypatch.setattr(running, "shut_down", lambda: None)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)

    def call(*arguments: object) -> Result:
        if dist.is_initialized():
            dist.distributed_c10d._get_default_store().delete_key(distributed._FAILURES)
        capsys.readouterr()
        status = command.main([str(argument) for argument in arguments])
        return Result(status, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory, launch: Launch) -> Path:
    """A small data set, built by the command that the README names."""
    out = tmp_path_factory.mktemp("data") / "scenes"
    arguments = ("--out", out, "--count", 130, "--image-size", 96, "--shard-samples", 40, "--holdout", 0.1)
    built = launch(sys.executable, "-m", "scinet.cli", "data", "build", "scenes", *arguments)
    assert built.returncode == 0, built.stderr
    splits = json.loads((out / "dataset.json").read_text())["splits"]
    assert 80 <= splits["train"]["num_samples"] < 96, "the tests count on five steps of 16 an epoch"
    return out


@pytest.fixture
def own_scenes(scenes: Path, tmp_path: Path) -> Path:
    """A copy of the data set to damage."""
    return Path(shutil.copytree(scenes, tmp_path / "own-scenes"))


@pytest.fixture(scope="session")
def small(scenes: Path) -> tuple[str, ...]:
    """The quickstart, cut down to two steps."""
    return (
        "--config",
        str(ROOT / "configs/quickstart.yaml"),
        f"data.path={scenes}",
        "baseline=",
        "model.image_size=64",
        "train.global_batch_size=16",
        "train.max_steps=2",
        "train.log_every_steps=1",
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, launch: Launch, small: tuple[str, ...]) -> Path:
    """A finished run, started as the README says."""
    output = tmp_path_factory.mktemp("runs")
    done = launch("deepspeed", "scinet/train.py", *small, f"output={output}", "name=trained")
    assert done.returncode == 0, done.stderr[-3000:]
    return output / "trained"
