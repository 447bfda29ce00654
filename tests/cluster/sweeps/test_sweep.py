"""A sweep as a user starts it: killed, gone on with, on two Ray nodes of which one dies."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from scinet import config
from scinet_cluster.addresses import free_port
from scinet_cluster.sweeps.ledger import Ledger, State

pytestmark = pytest.mark.multiprocess
ROOT = Path(__file__).resolve().parents[3]
_LONGEST_S = 240
_ONE_EPOCH = ("fixed.train.epochs=1", "stopping.grace_epochs=1")


@pytest.fixture(scope="module", autouse=True)
def _own_home(own_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ray keeps a token in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture
def configuration(tmp_path: Path, scenes: Path) -> Callable[..., Path]:
    """``configuration(space, **further)``: a sweep over trainings of seconds, in a folder of its own."""

    def write(space: dict[str, Any], **further: Any) -> Path:
        fixed = {
            "data.path": str(scenes),
            "data.cached_variants": 2,
            "model.image_size": 64,
            "train.global_batch_size": 16,
            "train.epochs": 2,
            "checkpoint.every_steps": 2,
        }
        tree = {
            "name": "tried",
            "output": str(tmp_path),
            "config": str(ROOT / "configs/quickstart.yaml"),
            "space": space,
            **further,
            "fixed": fixed | further.get("fixed", {}),
        }
        path = tmp_path / "sweep.yaml"
        path.write_text(json.dumps(tree))
        return path

    return write


def _start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "scinet_cluster.sweep", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _await(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + _LONGEST_S
    while not is_so():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.1)


def _trainings(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(folder) in " ".join(process.info["cmdline"] or []) and "train.py" in " ".join(process.info["cmdline"]):
            found.append(process)
    return found


def test_killed_sweep_goes_on_and_names_its_best(configuration: Callable[..., Path], tmp_path: Path) -> None:
    space = {"optimizer.head_learning_rate": [0.002, 1.0e30], "fusion.bank_size": [64, 10**12]}
    path = configuration(space, sampler="grid", trials=5, confirm={"top": 1, "seeds": 1})
    folder = tmp_path / "tried"

    sweep = _start("--config", path)
    record = folder / "trials.jsonl"
    _await(lambda: record.is_file() and 1 in Ledger(record).trials and bool(_trainings(folder)), sweep)
    sweep.kill()
    sweep.wait()
    end = time.monotonic() + 60
    while _trainings(folder):
        assert time.monotonic() < end, "trainings outlive their sweep"
        time.sleep(0.1)

    again = _start("--config", path)
    assert again.wait() == 2
    assert "--resume goes on with it" in again.communicate()[0]
    other = _start("--config", path, "--resume", "fixed.train.epochs=3")
    assert other.wait() == 2
    assert "was started with train.epochs=2, now it is 3" in other.communicate()[0]

    resumed = _start("--config", path, "--resume")
    said, _ = resumed.communicate(timeout=_LONGEST_S)
    assert resumed.returncode == 0, said
    trials = Ledger(record).trials
    assert [trial.state for trial in trials.values()].count(State.completed) == 4, said
    assert "lost" not in said
    reasons = [trial.reason for trial in trials.values() if trial.state is State.failed]
    assert len(reasons) == 3
    assert sum("not finite" in reason for reason in reasons) == 1
    assert sum("a rank would take" in reason for reason in reasons) == 2
    assert "Traceback" not in said
    _check_outcome(folder, trials)


def _check_outcome(folder: Path, trials: dict[int, Any]) -> None:
    tree = json.loads((folder / "sweep.json").read_text())
    assert tree["is_done"]
    best = config.load(folder / "best.yaml")
    assert best.optimizer.head_learning_rate in (0.001, 0.002)
    assert best.train.test_at_end
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert [int(row["number"]) for row in rows] == sorted(trials)
    page = (folder / "sweep.html").read_text()
    assert "With other seeds" in page
    assert "not finite" in page, "failed trials have their reason"
    kept = {path.parents[1].name for path in folder.glob("trials/*/checkpoints/selected")}
    assert len(kept) == 1, "weights of the best trial only"
    assert not list(folder.glob("trials/*/checkpoints/step-*"))
    assert not list(folder.glob("trials/.prometheus/*")), "nothing is announced any longer"
    for trial in trials.values():
        evaluation = folder / "trials" / trial.name / "evaluation.json"
        if trial.state is State.completed:
            assert set(json.loads(evaluation.read_text())) == {"class_names", "selected", "seconds"}


def test_sweep_ends_at_sigterm_with_its_trials_saved(configuration: Callable[..., Path], tmp_path: Path) -> None:
    path = configuration({"loss.margin": [0.5]}, sampler="grid", fixed={"train.epochs": 40})
    sweep = _start("--config", path)
    run = tmp_path / "tried/trials/0000"
    _await(lambda: any(run.glob("checkpoints/step-*")), sweep)
    second = _start("--config", path, "--resume")
    assert second.wait() == 2
    assert f"is being swept by another process (process {sweep.pid} on" in second.communicate()[0]
    sweep.terminate()
    said, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 143
    assert "--resume goes on" in said
    assert not _trainings(tmp_path)
    assert any(run.glob("checkpoints/step-*"))
    assert not Ledger(tmp_path / "tried/trials.jsonl").trials[0].has_ended


def test_sweep_that_cannot_begin_leaves_nothing(configuration: Callable[..., Path], tmp_path: Path) -> None:
    path = configuration({"loss.margin": [0.5]}, sampler="grid")
    for words, status, sentence in (
        (["resources.cpus_per_rank=4096"], 2, "a trial wants 4096 CPU(s) on each of 1 node(s)"),
        (
            ["resources.gpus_per_rank=99"],
            2,
            "lower resources.nodes, resources.ranks_per_node or resources.gpus_per_rank",
        ),
        (["resources.disk_budget_gb=1e9"], 2, "'resources.disk_budget_gb' is 1e+09, but"),
        (["--address", f"127.0.0.1:{free_port()}"], 2, "no Ray cluster answers there"),
        (["fixed.data.path=/nowhere"], 1, "the first trial, of the default, failed before its first evaluation"),
    ):
        refused = _start("--config", path, *words)
        said, _ = refused.communicate(timeout=_LONGEST_S)
        assert (refused.returncode, sentence in said) == (status, True), said
        assert not (tmp_path / "tried").exists()


@pytest.fixture
def two_nodes() -> Iterator[tuple[str, psutil.Process]]:
    """The address of a Ray cluster of two nodes with a core each, and the second node's process."""
    port = free_port()
    scratch = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets lie within: a longer path has no room for them
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_TMPDIR": scratch}
    ray = str(Path(sys.executable).with_name("ray"))
    common = ("--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats")
    subprocess.run([ray, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    before = set(psutil.pids())

    def started() -> list[psutil.Process]:
        return [psutil.Process(pid) for pid in psutil.pids() if pid not in before and _is_rays(pid)]

    try:
        head = ("--head", f"--port={port}", "--include-dashboard=false", "--node-ip-address=127.0.0.1")
        subprocess.run([ray, "start", *head, *common], env=environment, check=True, capture_output=True)
        (first,) = [process for process in started() if process.name() == "raylet"]
        joined = (f"--address=127.0.0.1:{port}",)
        subprocess.run([ray, "start", *joined, *common], env=environment, check=True, capture_output=True)
        (second,) = [process for process in started() if process.name() == "raylet" and process != first]
        yield f"127.0.0.1:{port}", second
    finally:
        for process in started():
            process.kill()
        shutil.rmtree(scratch, ignore_errors=True)


def _is_rays(pid: int) -> bool:
    try:
        return "ray" in " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


@pytest.mark.nightly
def test_trials_run_over_two_nodes_and_go_on_when_one_dies(
    configuration: Callable[..., Path], tmp_path: Path, two_nodes: tuple[str, psutil.Process]
) -> None:
    address, second = two_nodes
    path = configuration({"loss.margin": [0.5, 1.0]}, sampler="grid", confirm={"top": 0})
    wide = _start("--config", path, "--address", address, "name=wide", "trials=1", "resources.nodes=2", *_ONE_EPOCH)
    said, _ = wide.communicate(timeout=_LONGEST_S)
    assert wide.returncode == 0, said
    assert [rank for rank, _, _ in Ledger(tmp_path / "wide/trials.jsonl").trials[0].placed] == [0, 1]

    sweep = _start("--config", path, "--address", address, "trials=3", "fixed.train.epochs=4", "stopping.rule=none")
    record = tmp_path / "tried/trials.jsonl"
    _await(lambda: record.is_file() and 2 in Ledger(record).trials, sweep)
    _await(lambda: len(_trainings(tmp_path)) >= 4, sweep)  # two launchers, two ranks
    second.send_signal(signal.SIGKILL)
    said, _ = sweep.communicate(timeout=_LONGEST_S)
    assert sweep.returncode == 0, said
    assert "lost its process or its node: it goes on from its checkpoint" in said
    assert all(line.startswith(("trial ", "best", "nothing", str(tmp_path))) for line in said.splitlines()), said
    assert {trial.state for trial in Ledger(record).trials.values()} == {State.completed}
