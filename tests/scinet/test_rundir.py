"""One process writes a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scinet import config, rundir
from scinet.errors import CheckpointError, ConfigError
from scinet.options import Options, Weights

_HOLDER = """
import sys
from pathlib import Path
from scinet import rundir
with rundir.locked(rundir.RunDirectory(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> rundir.RunDirectory:
    return rundir.create(Options(output=str(tmp_path), name="run"))


def test_run_is_refused_while_another_process_writes_it(run: rundir.RunDirectory) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"being written by another process \(process {holder.pid} on "):
            rundir.locked(run).__enter__()
        holder.kill()
    with rundir.locked(run):
        pass


_WRITER = """
import sys
from pathlib import Path
from scinet import rundir
for number in range(200):
    rundir.write_text(Path(sys.argv[1]), sys.argv[2] * 1000)
"""


def test_file_is_whole_when_two_processes_write_it(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, path, letter]) for letter in "ab"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    assert path.read_text() in ("a" * 1000, "b" * 1000)
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_when_a_run_never_started(run: rundir.RunDirectory) -> None:
    with rundir.locked(run):
        rundir.discard_if_never_started(run)
    assert not run.path.exists()


def _begun(tmp_path: Path, *overrides: str) -> rundir.RunDirectory:
    """The directory of a run that has begun."""
    options = config.load(None, [f"output={tmp_path}", *overrides])
    run = rundir.create(options)
    rundir.describe(run, options, weights_sha256="w", card_sha256="c", world_size=2)
    return run


def _again(run: rundir.RunDirectory, *overrides: str) -> rundir.RunDirectory:
    return rundir.create(config.load(None, [f"output={run.path.parent}", *overrides]))


def test_run_is_never_begun_over_another(tmp_path: Path) -> None:
    run = _begun(tmp_path)
    with pytest.raises(ConfigError, match="holds an unfinished run: --resume auto goes on with it"):
        _again(run)
    run.evaluation.write_text("{}")
    with pytest.raises(ConfigError, match="holds a finished run"):
        _again(run)
    assert _again(run, "resume=true") == run
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is no run of scinet"):
        _again(run, "name=strange")


def test_run_goes_on_with_what_changes_no_number_and_with_nothing_else(tmp_path: Path) -> None:
    # what decides where bytes come from, when they are kept and who is told
    free = {"resume", "output", "baseline"}
    free |= {f"data.{key}" for key in ("prepare", "workers", "cache_dir", "timeout_s", "retries", "cache_shards")}
    free |= {"data.allow_pipe", "train.collective_timeout_s", "train.hang_timeout_s"}
    free |= {"train.on_bad_numbers", "train.max_bad_steps"}
    keys = [key for key, _, _ in config.fields()]
    free |= {key for key in keys if key.startswith(("checkpoint.", "telemetry."))}
    assert free == rundir.FREE_ON_RESUME
    assert free <= set(keys)
    run = _begun(tmp_path, "data.known_ratio=0.3")
    for words in ("data.workers=2", "checkpoint.keep_last=5", "train.on_bad_numbers=skip", "telemetry.port=9100"):
        assert _again(run, "resume=true", words) == run
    for words, was in (
        ("data.known_ratio=0.5", "data.known_ratio=0.3, now it is 0.5"),
        ("seed=1", "seed=0, now it is 1"),
        ("method=bce", "method=scinet, now it is bce"),
        ("deepspeed.zero_optimization.stage=1", "deepspeed={}"),
        ("train.accumulation_steps=2", "train.accumulation_steps=1"),
    ):
        with pytest.raises(ConfigError, match=f"was started with {was}"):
            _again(run, "resume=true", words)


def test_run_is_found_with_its_configuration_or_the_nearest_named(tmp_path: Path) -> None:
    run = _begun(tmp_path, "seed=7", "name=mine")
    found, options = rundir.find(run.path)
    assert (found, options.seed) == (run, 7)
    with pytest.raises(CheckpointError, match=r"has no config.yaml; did you mean '.*mine'"):
        rundir.find(tmp_path / "mien")
    with pytest.raises(CheckpointError, match="is not finished"):
        rundir.read_evaluation(run)
    older = "\n".join(line for line in run.config.read_text().splitlines() if "weights:" not in line)
    run.config.write_text(older.replace("instance_weight: 1.0", "instance_weight: 0.25"))
    assert rundir.find(run.path)[1].fusion.weights is Weights.fixed, "earlier versions had no others"
    run.evaluation.write_text('{"a": 1}')
    assert rundir.read_evaluation(run) == {"a": 1}


def test_file_has_its_name_only_when_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, done = tmp_path / "it.json", []
    path.write_text("old")
    fsync, replace = os.fsync, os.replace

    def flushed(handle: int) -> None:
        done.append(("flush", Path(os.readlink(f"/proc/self/fd/{handle}")).name, path.read_text()))
        fsync(handle)

    def renamed(one: Path, other: Path) -> None:
        done.append(("rename", Path(one).read_text(), path.read_text()))
        replace(one, other)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    rundir.write_text(path, "new")
    assert done == [("flush", f".it.json.{os.getpid()}.part", "old"), ("rename", "new", "old")]
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["it.json"]


def test_old_file_stays_and_no_half_one_when_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "it.json"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*it\.json"):
        rundir.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["it.json"]


# whether another process, which takes milliseconds to start, could take the lock
_TRY = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        print("free")
    except OSError:
        print("taken by", file.read().decode())
"""


def test_lock_is_taken_while_a_run_is_written_and_free_afterwards(run: rundir.RunDirectory) -> None:
    def look() -> str:
        command = [sys.executable, "-S", "-c", _TRY, str(run.lock)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with rundir.locked(run):
        assert look().startswith(f"taken by process {os.getpid()} on ")
    assert look() == "free"
