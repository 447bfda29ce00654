"""What tests that start real commands share, made once a session: an environment, a data set, a small configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
_MOST_FILES = 12
Launch = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files that start processes first: the longest, so that no core waits for them in the end."""
    long = {item.path for item in items if item.get_closest_marker("multiprocess")}
    items.sort(key=lambda item: item.path not in long)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print which files took longest: the budget of the whole is a quarter of an hour on two cores."""
    seconds: Counter[str] = Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section("seconds a file")
    for name, spent in seconds.most_common(_MOST_FILES):
        terminalreporter.write_line(f"{spent:7.1f}  {name}")


@pytest.fixture(scope="session")
def own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this session's own, one thread a process, and the repository root as the current folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command sets it, for ranks that are forked
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="session")
def launch(own_environment: None) -> Launch:
    """``launch("torchrun", ...)``: run a command to its end, with standard output and error apart."""
    del own_environment

    def run(*command: object, timeout_s: int = 300) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        # what a run inside this process has set for DeepSpeed is not the launcher's business
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        return subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment
        )

    return run


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


@pytest.fixture(scope="session")
def small(scenes: Path) -> tuple[str, ...]:
    """The quickstart, cut down to two steps of small random towers."""
    return (
        "--config",
        str(ROOT / "configs/quickstart.yaml"),
        f"data.path={scenes}",
        "baseline=",
        "model.backbone=debug",
        "model.image_size=64",
        "train.global_batch_size=16",
        "train.max_steps=2",
        "train.log_every_steps=1",
    )
