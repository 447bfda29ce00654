"""Checkpoints are whole or not there, kept by policy, and a damaged one is passed over."""

from __future__ import annotations

import logging
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scinet.checkpoint import files
from scinet.checkpoint.keeper import Keeper
from scinet.distributed import Ranks, initialise
from scinet.errors import CheckpointError
from scinet.layout import whole
from scinet.notes import Notes
from scinet.options import CheckpointOptions
from scinet.rundir import RunDirectory
from scinet.telemetry.observer import Observer
from scinet.trainer import State


class Counter:
    """What a keeper sees of a trainer: one tensor that counts the steps."""

    def __init__(self, size: int = 1000) -> None:
        self.weight = torch.zeros(size)
        self.progress = SimpleNamespace(step=0, epoch=0, judged=-1, last_map=-1.0)
        self.engine = SimpleNamespace(zero_stage=0)

    def go(self, step: int, holdout_map: float | None = None) -> Any:
        self.progress.step = step
        self.progress.judged = -1 if holdout_map is None else self.progress.epoch
        self.progress.last_map = -1.0 if holdout_map is None else holdout_map
        self.weight.fill_(step)
        return self

    def state(self) -> State:
        def settle(saved: dict[str, Any]) -> None:
            self.progress = SimpleNamespace(**saved["progress"])

        return State([whole("weight", self.weight)], {"progress": dict(vars(self.progress))}, settle)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    return initialise(60)


def _keeper(folder: Path, ranks: Ranks, **options: Any) -> Keeper:
    (folder / "checkpoints").mkdir(exist_ok=True)
    return Keeper(RunDirectory(folder), CheckpointOptions(**options), ranks, patience_s=5, notes=Notes(ranks))


def _save(keeper: Keeper, counter: Counter, *steps: int) -> None:
    for step in steps:
        keeper.save(counter.go(step))
    keeper.wait()


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in (folder / "checkpoints").glob("step-*"))


def _loaded(folder: Path, ranks: Ranks) -> tuple[int, list[str]]:
    counter, said = Counter(), []
    assert _keeper(folder, ranks).load(counter, said.append)  # type: ignore[arg-type]
    assert (counter.weight == counter.progress.step).all()
    return counter.progress.step, said


def test_nothing_is_loaded_when_there_is_nothing(tmp_path: Path, ranks: Ranks) -> None:
    assert not _keeper(tmp_path, ranks).load(Counter(), print)  # type: ignore[arg-type]


def test_newest_is_loaded_and_the_oldest_go(tmp_path: Path, ranks: Ranks) -> None:
    _save(_keeper(tmp_path, ranks), Counter(), 1, 2, 3, 4)
    assert _steps(tmp_path) == [3, 4]
    assert _loaded(tmp_path, ranks) == (4, [])


def test_policy_keeps_the_last_the_best_and_every_so_many(tmp_path: Path, ranks: Ranks) -> None:
    keeper, counter = _keeper(tmp_path, ranks, keep_last=1, keep_best=2, keep_every_steps=4), Counter()
    for step, holdout_map in ((1, 10.0), (2, 90.0), (3, 20.0), (4, None), (5, 80.0), (6, 30.0), (7, None)):
        keeper.save(counter.go(step, holdout_map))
    keeper.wait()
    assert _steps(tmp_path) == [2, 4, 5, 7]


@pytest.mark.parametrize("damaged", ["part-00000-of-00001.safetensors", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_previous_is_taken_when_the_newest_is_damaged(tmp_path: Path, ranks: Ranks, damaged: str, how: str) -> None:
    _save(_keeper(tmp_path, ranks), Counter(), 1, 2)
    path = tmp_path / "checkpoints/step-0000000002" / damaged
    content = path.read_bytes()
    if how == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if how == "cut" else content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    step, said = _loaded(tmp_path, ranks)
    assert step == 1
    (line,) = said
    assert "step-0000000002 is damaged" in line
    assert damaged in line
    keeper, counter = _keeper(tmp_path, ranks), Counter()
    _save(keeper, counter, 2)
    assert _loaded(tmp_path, ranks) == (2, [])


def test_error_counts_the_checkpoints_when_none_is_whole(tmp_path: Path, ranks: Ranks) -> None:
    _save(_keeper(tmp_path, ranks), Counter(), 1, 2)
    for path in (tmp_path / "checkpoints").glob("*/part-*"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints in"):
        _keeper(tmp_path, ranks).load(Counter(), lambda _: None)  # type: ignore[arg-type]


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path, ranks: Ranks) -> None:
    _save(_keeper(tmp_path, ranks), Counter(), 1)
    left = tmp_path / "checkpoints/.step-0000000002.part"
    left.mkdir()
    (left / "part-00000-of-00001.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoints/latest.json").unlink()
    assert _loaded(tmp_path, ranks) == (1, [])
    assert not left.exists()


def test_an_older_one_is_taken_when_latest_names_it(tmp_path: Path, ranks: Ranks) -> None:
    _save(_keeper(tmp_path, ranks), Counter(), 1, 2)
    (tmp_path / "checkpoints/latest.json").write_text('{"tag": "step-0000000001"}')
    assert _loaded(tmp_path, ranks) == (1, [])


def test_error_names_the_tensor_when_it_has_another_shape(tmp_path: Path, ranks: Ranks) -> None:
    _save(_keeper(tmp_path, ranks), Counter(8), 1)
    with pytest.raises(CheckpointError, match=r"'weight' has shape \[8\], this run has \[9\]"):
        _keeper(tmp_path, ranks).load(Counter(9), print)  # type: ignore[arg-type]


@pytest.fixture
def small_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_previous_stays_when_a_file_cannot_be_written(
    tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = _keeper(tmp_path, ranks)
    _save(keeper, Counter(10), 1)
    with caplog.at_level(logging.WARNING, logger="scinet"):
        _save(keeper, Counter(100_000), 2)
    assert "step-0000000002 was not written (rank 0: File too large): the previous one stays" in caplog.text
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest.json", "step-0000000001"]
    _save(keeper, Counter(10), 3)
    assert _steps(tmp_path) == [1, 3]


def test_checkpoint_is_on_the_disk_before_it_has_its_name_and_old_ones_go_last(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, counter = _keeper(tmp_path, ranks, keep_last=1), Counter()
    _save(keeper, counter, 1)
    done: list[str] = []
    fsync, replace, rmtree = os.fsync, os.replace, shutil.rmtree

    def flushed(handle: int) -> None:
        done.append(f"flush {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        fsync(handle)

    def renamed(one: Path, other: Path) -> None:
        done.append(f"rename {Path(one).name} {Path(other).name}")
        replace(one, other)

    def removed(folder: Path, **named: Any) -> None:
        done.append(f"remove {Path(folder).name}")
        rmtree(folder, **named)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(shutil, "rmtree", removed)
    _save(keeper, counter, 2)
    old, new = "step-0000000001", "step-0000000002"
    assert [line for line in done if line != f"remove .{new}.old"] == [
        "flush part-00000-of-00001.safetensors",
        "flush manifest.json",
        f"flush .{new}.part",
        f"rename .{new}.part {new}",
        "flush checkpoints",
        f"flush .latest.json.{os.getpid()}.part",
        f"rename .latest.json.{os.getpid()}.part latest.json",
        f"remove {old}",
    ]


def test_training_goes_on_while_a_copy_of_its_state_is_written(tmp_path: Path, ranks: Ranks) -> None:
    keeper, counter = _keeper(tmp_path, ranks), Counter()
    keeper.save(counter.go(5))
    counter.go(6)  # before the file is written, perhaps
    keeper.wait()
    assert _loaded(tmp_path, ranks) == (5, [])


def test_state_that_lacks_a_tensor_or_a_count_is_refused(tmp_path: Path, ranks: Ranks) -> None:
    _save(_keeper(tmp_path, ranks), Counter(), 1)

    class Richer(Counter):
        def state(self) -> State:
            plain = super().state()
            return State([*plain.parts, whole("bias", torch.zeros(3))], plain.scalars, plain.settle)

    with pytest.raises(CheckpointError, match=r"not made by this configuration .*'bias' has 0 of 3 elements"):
        _keeper(tmp_path, ranks).load(Richer(), print)  # type: ignore[arg-type]

    class Pickier(Counter):
        def state(self) -> State:
            plain = super().state()
            return State(plain.parts, plain.scalars, lambda saved: saved["updates"])

    with pytest.raises(CheckpointError, match=r"not made by this configuration .*KeyError: 'updates'"):
        _keeper(tmp_path, ranks).load(Pickier(), print)  # type: ignore[arg-type]


def test_best_are_those_that_were_judged_and_of_equals_the_newest_stays(tmp_path: Path, ranks: Ranks) -> None:
    keeper, counter = _keeper(tmp_path, ranks, keep_last=1, keep_best=1), Counter()
    for step, holdout_map in ((1, 50.0), (2, 50.0), (3, 40.0), (4, None)):
        keeper.save(counter.go(step, holdout_map))
    keeper.wait()
    assert _steps(tmp_path) == [2, 4]


def test_observer_is_told_of_what_was_written_and_what_was_not(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []

    class Told(Observer):
        def checkpoint(self, seconds: float, *, is_written: bool) -> None:
            assert seconds >= 0
            told.append(is_written)

    (tmp_path / "checkpoints").mkdir()
    keeper = Keeper(
        RunDirectory(tmp_path), CheckpointOptions(), ranks, patience_s=5, notes=Notes(ranks), observer=Told()
    )
    _save(keeper, Counter(), 1)

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "flush_folder", full)
    _save(keeper, Counter(), 2)
    assert told == [True, False]
    assert _steps(tmp_path) == [1]


def test_ranks_that_do_not_finish_their_part_leave_the_previous_one(
    tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    _save(_keeper(tmp_path, ranks), Counter(), 1)
    two = Ranks(0, 2, ranks.device)
    keeper = Keeper(RunDirectory(tmp_path), CheckpointOptions(), two, patience_s=0.1, notes=Notes(ranks))
    with caplog.at_level(logging.WARNING, logger="scinet"):
        _save(keeper, Counter(), 2)
    assert "rank 1 did not finish its part in 0.1 s" in caplog.text
    assert _steps(tmp_path) == [1]


def test_newest_before_a_damaged_one_is_taken_and_the_newest_when_nothing_says_which(
    tmp_path: Path, ranks: Ranks
) -> None:
    _save(_keeper(tmp_path, ranks, keep_last=4), Counter(), 1, 2, 3, 12)
    (tmp_path / "checkpoints/latest.json").unlink()
    assert _loaded(tmp_path, ranks) == (12, [])
    (tmp_path / "checkpoints/step-0000000012/manifest.json").unlink()
    step, said = _loaded(tmp_path, ranks)
    assert (step, len(said)) == (3, 1)


def test_weights_between_two_evaluations_are_not_the_best_of_the_last(tmp_path: Path, ranks: Ranks) -> None:
    keeper, counter = _keeper(tmp_path, ranks, keep_last=1, keep_best=1), Counter()
    for step, epoch, judged, last_map in ((4, 1, 1, 50.0), (8, 2, 2, 70.0), (12, 3, 2, 70.0), (14, 3, 2, 70.0)):
        counter.go(step)
        counter.progress = SimpleNamespace(step=step, epoch=epoch, judged=judged, last_map=last_map)
        keeper.save(counter)  # type: ignore[arg-type]
    keeper.wait()
    assert _steps(tmp_path) == [8, 14]
