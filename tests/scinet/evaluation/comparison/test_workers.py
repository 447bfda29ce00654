"""Cells side by side: every one ends, a lost process costs its own cell, and no process is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from scinet.errors import DataError
from scinet.evaluation.comparison import training, workers
from scinet.evaluation.comparison.store import Store
from scinet.evaluation.comparison.workers import Reply, Task
from scinet.options import Options
from tests.scinet.evaluation.comparison import fake_worker
from tests.scinet.evaluation.comparison.fakes import make_finished, make_test_set

pytestmark = pytest.mark.multiprocess
ROOT = Path(__file__).resolve().parents[4]


def make_tasks(*keys: str) -> list[Task]:
    """Tasks that a fake worker understands."""
    return [Task(key, Options(), {}, test_peak=False) for key in keys]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``run(*keys, jobs=2, gpus=())``: what became of tasks, as (key or None, reply)."""
    monkeypatch.setattr(workers, "serve", fake_worker.serve)

    def call(*keys: str, jobs: int = 2, gpus: tuple[str, ...] = ()) -> list[tuple[str | None, Reply]]:
        replies = workers.carry_out(make_tasks(*keys), tmp_path, jobs, gpus)
        return [(task and task.key, reply) for task, reply in replies]

    return call


def _processes(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.*") if path.stem.isdigit()]


def _await_end(processes: list[int]) -> None:
    for _ in range(100):
        if not any(Path(f"/proc/{process}").exists() for process in processes):
            return
        time.sleep(0.1)
    for process in processes:
        os.kill(process, 9)
    pytest.fail("a worker outlived the command")


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_every_cell_ends_once_at_any_number_of_jobs(run: Any, tmp_path: Path, jobs: int) -> None:
    found = run("a", "b", "c", "d", jobs=jobs)
    assert Counter((key, reply.state) for key, reply in found) == {(key, "done"): 1 for key in "abcd"}
    assert len(_processes(tmp_path)) == jobs
    _await_end(_processes(tmp_path))


def test_other_cells_go_on_when_one_fails_or_its_process_dies(run: Any, tmp_path: Path) -> None:
    found = dict(run("fail", "a", "die", "b", "c", jobs=1))
    assert len(_processes(tmp_path)) == 2  # another for the one that died
    assert {key: reply.state for key, reply in found.items()} == {
        **dict.fromkeys("abc", "done"),
        "fail": "failed",
        "die": "failed",
    }
    assert found["fail"].text == "it broke"
    assert "was killed, as a machine does that runs out of memory: try fewer --jobs" in found["die"].text


def test_a_cell_that_another_command_trains_is_tried_again_after_the_others(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_BETWEEN_TRIES_S", 0.1)
    found = run("busy", "a", "b", jobs=1)
    assert [(key, reply.state) for key, reply in found] == [
        ("busy", "busy"),
        ("a", "done"),
        ("b", "done"),
        ("busy", "done"),
    ]


def test_progress_is_passed_on(run: Any) -> None:
    assert run("slow", jobs=1) == [(None, Reply("progress", "features", 1, 2)), ("slow", Reply("done"))]


def test_each_process_sees_one_gpu_when_there_are_any(run: Any, tmp_path: Path) -> None:
    run("a", "b", "c", "d", "e", jobs=3, gpus=("4", "7"))
    assert sorted(path.suffix for path in tmp_path.glob("*.*")) == [".4", ".4", ".7"]


def test_workers_end_when_the_loop_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workers, "serve", fake_worker.serve)
    replies = workers.carry_out(make_tasks("a", "sleep"), tmp_path, 2, [])
    assert next(replies)[1] == Reply("done")
    replies.close()
    _await_end(_processes(tmp_path))


def test_workers_end_when_the_command_is_killed(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from tests.scinet.evaluation.comparison import fake_worker; "
    code += "fake_worker.main(Path(sys.argv[1]))"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT) as command:
        for _ in range(300):
            if len(_processes(tmp_path)) == 2:
                break
            time.sleep(0.1)
        command.kill()
    assert len(_processes(tmp_path)) == 2
    _await_end(_processes(tmp_path))


class _Trainings:
    """Trains a cell to a fake result, or raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.count = error, 0

    def train(self, options: Options, *, test_peak: bool) -> Any:
        self.count += 1
        if self.error:
            raise self.error
        return make_finished(make_test_set(), 0.3, peak=60.0 if test_peak else None)


def _attempt(folder: Path, trainings: _Trainings, *, test_peak: bool = False) -> Reply:
    task = Task("00112233445566ff", Options(), {"seed": 0}, test_peak)
    return workers._attempt(task, Store(folder), trainings)  # type: ignore[arg-type]


def test_a_finished_cell_never_trains_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "RESAMPLES", 10)
    trainings = _Trainings()
    assert [_attempt(tmp_path, trainings) for _ in range(2)] == [Reply("done")] * 2
    assert trainings.count == 1
    assert _attempt(tmp_path, trainings, test_peak=True) == Reply("done")  # now with the peak
    assert _attempt(tmp_path, trainings, test_peak=True) == Reply("done")
    assert trainings.count == 2


@pytest.mark.parametrize(
    ("error", "said", "is_last"),
    [
        (DataError("a shard is damaged"), "a shard is damaged", False),
        (IndexError("out of\nrange"), "IndexError: out of range", True),  # its memory may be spoilt
    ],
)
def test_a_cell_fails_with_one_sentence_when_training_raises(
    tmp_path: Path, error: Exception, said: str, is_last: bool
) -> None:
    assert _attempt(tmp_path, _Trainings(error)) == Reply("failed", said, is_last=is_last)
    assert not list(tmp_path.glob("*.json"))
