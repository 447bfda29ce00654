"""What is seen of a run: from its files, and from its endpoints where they answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scinet import rundir
from scinet.options import Options, TrainOptions
from scinet.rundir import RunDirectory
from scinet.top.rows import Rows
from scinet.top.watch import State, Watch
from tests.scinet.top.conftest import FIGURES, Serve, announce, ok


def add(run: RunDirectory, **row: object) -> None:
    with run.metrics.open("a") as file:
        file.write(json.dumps(row) + "\n")


_HOLDER = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(run: RunDirectory) -> Iterator[RunDirectory]:
    """The run while another process writes it: a lock is no obstacle to the process that has it."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", _HOLDER, run.lock], stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield run
        holder.kill()


def test_figures_come_from_the_files_when_there_is_no_endpoint(held: RunDirectory) -> None:
    look = Watch(held, Options(name="one")).look()
    assert (look.name, look.state, look.step, look.total_steps) == ("one", State.training, 12, 50)
    assert (look.samples_per_second, look.loss, look.last_map, look.best_map) == (40, 0.25, 50, 55)
    assert look.eta_s == pytest.approx((50 - 12) * 128 / 40)
    assert look.wait_share == 0.25
    assert look.parts == {"total": 0.25, "supervised": 2 / 12}
    assert (look.ranks, look.num_ranks) == ([], None)


def test_figures_come_from_the_endpoint_when_it_answers(run: RunDirectory, serve: Serve) -> None:
    announce(run, f"127.0.0.1:{serve(ok(FIGURES))}")
    look = Watch(run, Options(name="one")).look()
    assert (look.state, look.step, look.total_steps) == (State.training, 13, 50)
    assert [(rank.rank, rank.is_up, rank.host) for rank in look.ranks] == [("0", True, "alpha"), ("1", False, "beta")]
    assert (look.ranks_up, look.num_ranks, look.memory_bytes) == (1, 2, 3 * 2**30)


def test_throughput_is_that_between_two_looks(run: RunDirectory, serve: Serve) -> None:
    watch = Watch(run, Options(name="one"))
    announce(run, f"127.0.0.1:{serve(ok(FIGURES))}")
    assert watch.look().samples_per_second == 40
    announce(run, f"127.0.0.1:{serve(ok(FIGURES.replace('_total 1664.0', '_total 9e9')))}")
    speed = watch.look().samples_per_second
    assert speed is not None
    assert speed > 1e6


def test_figures_of_another_run_on_the_same_port_are_not_taken(run: RunDirectory, serve: Serve) -> None:
    port = serve(ok(FIGURES.replace('run="one"', 'run="two"')))
    announce(run, f"127.0.0.1:{port}")
    look = Watch(run, Options(name="one")).look()
    assert (look.state, look.step, look.ranks) == (State.ended, 12, [])


@pytest.mark.parametrize(("step", "state"), [(12, State.training), (15, State.evaluating), (50, State.evaluating)])
def test_run_evaluates_when_an_epoch_without_its_row_or_all_steps_are_done(
    held: RunDirectory, step: int, state: State
) -> None:
    add(held, step=step)
    assert Watch(held, Options()).look().state is state
    assert Watch(held, Options(train=TrainOptions(max_steps=50))).look().state is state


def test_run_trains_when_its_epoch_has_been_judged(held: RunDirectory) -> None:
    add(held, step=15)
    add(held, step=15, epoch=2, holdout_map=70.0)
    look = Watch(held, Options()).look()
    assert (look.state, look.best_map) == (State.training, 70)


def test_run_is_stalled_when_no_step_came_for_as_long_as_a_hang_takes(held: RunDirectory) -> None:
    watch = Watch(held, Options())
    assert watch.look().state is State.training
    long_ago = time.time() - 400
    os.utime(held.metrics, (long_ago, long_ago))
    assert Watch(held, Options()).look().state is State.stalled
    assert Watch(held, Options(train=TrainOptions(hang_timeout_s=500))).look().state is State.training


def test_run_starts_when_it_is_locked_and_has_no_row(held: RunDirectory) -> None:
    held.metrics.unlink()
    look = Watch(held, Options()).look()
    assert (look.state, look.step, look.total_steps, look.loss, look.eta_s) == (State.starting, 0, None, None, None)


def test_run_has_ended_or_finished_when_nobody_holds_it(run: RunDirectory) -> None:
    watch = Watch(run, Options())
    look = watch.look()
    assert (look.state, look.eta_s) == (State.ended, None)
    run.evaluation.write_text("{}")
    look = watch.look()
    assert (look.state, look.total_steps) == (State.finished, 12)


def test_looking_takes_no_lock(run: RunDirectory) -> None:
    run.lock.touch()
    assert Watch(run, Options()).look().state is State.ended
    with rundir.locked(run):
        pass


def test_rows_that_were_added_are_read_and_half_ones_wait(run: RunDirectory) -> None:
    rows = Rows(run.metrics)
    rows.follow()
    with run.metrics.open("a") as file:
        file.write('{"step": 13, "loss/total": 1')
        file.flush()
        rows.follow()
        assert rows.step == 12
        file.write(".5}\n")
    rows.follow()
    assert (rows.step, rows.training["loss/total"], rows.best_map) == (13, 1.5, 55)


def test_rows_are_read_anew_when_the_run_went_back(run: RunDirectory) -> None:
    rows = Rows(run.metrics)
    rows.follow()
    part = run.metrics.with_name("part")
    part.write_text('{"step": 3, "loss/total": 9.0}\n')
    part.replace(run.metrics)
    rows.follow()
    assert (rows.step, rows.best_map, rows.holdout) == (3, None, {})
    run.metrics.unlink()
    rows.follow()
    assert (rows.step, rows.training) == (0, {})


def test_rows_are_read_anew_when_the_run_went_back_and_has_come_further(run: RunDirectory) -> None:
    rows = Rows(run.metrics)
    rows.follow()
    size = run.metrics.stat().st_size
    part = run.metrics.with_name("part")
    part.write_text('{"step": 3, "loss/total": 9.0}\n' + '{"step": 4, "loss/total": 8.0}\n' * size)
    part.replace(run.metrics)
    rows.follow()
    assert (rows.step, rows.best_map, rows.holdout) == (4, None, {})


def test_only_the_end_is_read_when_the_file_is_large(run: RunDirectory) -> None:
    with run.metrics.open("ab") as file:
        file.truncate(1 << 36)  # a hole, which no read of it all would survive
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"step": 99, "loss/total": 0.5}\n')
    rows = Rows(run.metrics)
    rows.follow()
    assert (rows.step, rows.training["loss/total"]) == (99, 0.5)


@pytest.mark.parametrize(
    "text",
    [
        b"\x00\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b"7\n",
        b'{"loss/total": 1}\n',
        b'{"step": "12"}\n',
        b'{"step": true}\n',
        b'{"step": NaN}\n',
        b'{"step": 1e999}\n',
        b'{"step": ' + b"9" * 5000 + b"}\n",
        b'{"step": ' + b"9" * 400 + b"}\n",
    ],
)
def test_rows_that_are_none_are_passed_over(run: RunDirectory, text: bytes) -> None:
    run.metrics.write_bytes(run.metrics.read_bytes() + text)
    rows = Rows(run.metrics)
    rows.follow()
    assert (rows.step, rows.best_map) == (12, 55)


def test_figures_that_are_no_numbers_are_left_out(held: RunDirectory) -> None:
    add(
        held,
        **{"step": 12, "loss/total": "low", "loss/supervised": [], "samples_per_second": -1, "data_wait_share": {}},
    )
    look = Watch(held, Options()).look()
    assert (look.loss, look.parts, look.wait_share, look.samples_per_second) == (None, {}, None, None)


def test_pipes_in_the_place_of_files_are_not_waited_for(run: RunDirectory) -> None:
    run.metrics.unlink()
    run.targets.parent.mkdir()
    for path in (run.metrics, run.targets, run.lock):
        os.mkfifo(path)
    assert Watch(run, Options()).look().step == 0


def test_an_evaluation_row_without_an_epoch_says_nothing_about_the_steps(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "x")
    directory.path.mkdir()
    for epoch in (-1, None, "2", 1e300):
        add(directory, step=5, epoch=epoch, holdout_map=1.0)
        Watch(directory, Options()).look()
