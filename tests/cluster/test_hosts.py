"""Two and four hosts, as network namespaces with real addresses: they train as one does, and survive a pulled cable."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import Host, network

pytestmark = [pytest.mark.multiprocess, pytest.mark.nightly, pytest.mark.alone]

LAUNCH = (sys.executable, "-m", "scinet_cluster.launch")
CLOCKS = {"samples_per_second", "data_wait_share"}
RESUME = ("--resume", "auto")
LOST = 142
STEPS = 5
TIMEOUT_S = 45  # also of what rank 0 prepares alone
SLACK_S = 60  # from the time-out to the end of the launcher, on a busy machine; TCP itself takes a quarter of an hour


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with network(2) as made:
        yield made


@pytest.fixture(scope="module")
def words(small: tuple[str, ...]) -> tuple[str, ...]:
    return (
        "scinet/train.py",
        *small,
        "train.max_steps=0",
        "train.epochs=1",
        "checkpoint.every_steps=1",
        f"train.collective_timeout_s={TIMEOUT_S}",
        f"train.hang_timeout_s={TIMEOUT_S + SLACK_S // 2}",
    )


def _start(hosts: list[Host], slots: int, words: tuple[str, ...], folder: Path) -> list[Any]:
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots={slots}\n" for host in hosts))
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    command = (*LAUNCH, "--hostfile", hostfile, "--grace", 10, "--", *words)
    return [host.start(command, folder / f"{host.name}.log", environment) for host in hosts]


def _logs(folder: Path) -> str:
    return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("host*.log")))


def _assert_all_end_well(hosts: list[Host], processes: list[Any], folder: Path) -> None:
    assert {process.wait(timeout=150) for process in processes} == {0}, _logs(folder)
    assert not any(host.running() for host in hosts)


def _rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]


def _results(run: Path) -> dict[str, Any]:
    found = json.loads((run / "evaluation.json").read_text())
    del found["seconds"]
    return dict(found)


def _saved_step(run: Path) -> int:
    path = run / "checkpoints" / "latest.json"
    return int(json.loads(path.read_text())["tag"].rpartition("-")[2]) if path.exists() else 0


@dataclass(frozen=True)
class Cut:
    """What was seen after a cable was pulled in mid-run: statuses (None: still running), and what ran on."""

    run: Path
    step: int
    statuses: list[int | None]
    running: list[list[str]]
    logs: list[str]


@pytest.fixture(scope="module")
def unbroken(words: tuple[str, ...], launch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one host; it leaves the cached features behind, which rank 0 alone would make."""
    folder = tmp_path_factory.mktemp("one")
    one = launch(*LAUNCH, "--ranks-per-node", 2, "--", *words, f"output={folder}", "name=unbroken")
    assert one.returncode == 0, one.stderr[-3000:]
    return folder / "unbroken"


def _cut_off(number: int, words: tuple[str, ...], folder: Path) -> Cut:
    """Train on that many hosts, one rank each, and pull the cable of the second in mid-run."""
    with network(number) as hosts:
        processes = _start(hosts, 1, (*words, f"output={folder}", "name=run"), folder)
        end = time.monotonic() + 180
        while _saved_step(folder / "run") < 2:
            assert all(process.poll() is None for process in processes), _logs(folder)
            assert time.monotonic() < end, _logs(folder)
            time.sleep(0.01)
        hosts[1].cut_off()
        step = _saved_step(folder / "run")
        end = time.monotonic() + TIMEOUT_S + SLACK_S
        while time.monotonic() < end and any(process.poll() is None for process in processes):
            time.sleep(0.1)
        statuses = [process.poll() for process in processes]
        running = [host.running() for host in hosts]
        logs = [(folder / f"{host.name}.log").read_text() for host in hosts]
        return Cut(folder / "run", step, statuses, running, logs)


def _assert_all_end_in_time(cut: Cut) -> None:
    assert 2 <= cut.step < STEPS, "the cable was pulled in mid-run"
    assert set(cut.statuses) == {LOST}, cut.logs
    assert not any(cut.running)
    for log in cut.logs:
        assert "Traceback" not in log
        assert "frame #" not in log, "nor one of torch's own"
        assert log.count("error: ") <= 1, log
        assert "ended with status 142: another rank was lost or hung" in log
    # the side of rank 0 agrees on who speaks; beyond the cut each host speaks for itself
    first, second, *others = cut.logs
    assert sum(_tells_of_the_loss(log) for log in (first, *others)) == 1, "\n".join(cut.logs)
    assert _tells_of_the_loss(second), second


def _tells_of_the_loss(log: str) -> bool:
    # a step cut off in mid-collective may outlast gloo's time-out; then the guard names the rank it waits for
    return bool(re.search("error: (another rank was lost|rank .* (cannot be reached|gives no sign of life))", log))


@pytest.fixture(scope="module")
def cut(words: tuple[str, ...], unbroken: Path, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    del unbroken
    return _cut_off(2, words, tmp_path_factory.mktemp("cut"))


def test_both_sides_end_in_time_when_a_host_is_cut_off(cut: Cut) -> None:
    _assert_all_end_in_time(cut)


def test_run_ends_as_on_one_host_when_a_host_was_cut_off_and_all_start_again(
    hosts: list[Host], words: tuple[str, ...], unbroken: Path, cut: Cut, tmp_path: Path
) -> None:
    again = (*words, f"output={cut.run.parent}", "name=run", *RESUME)
    _assert_all_end_well(hosts, _start(hosts, 1, again, tmp_path), tmp_path)
    assert "resumed after" in _logs(tmp_path)
    assert _rows(cut.run) == _rows(unbroken)
    assert _results(cut.run) == _results(unbroken)


def test_two_hosts_finish_the_run_of_four_when_one_of_those_was_cut_off(
    words: tuple[str, ...], unbroken: Path, tmp_path: Path
) -> None:
    cut = _cut_off(4, words, tmp_path)
    _assert_all_end_in_time(cut)
    again = (*words, f"output={tmp_path}", "name=run", *RESUME)
    with network(2) as hosts:
        _assert_all_end_well(hosts, _start(hosts, 1, again, tmp_path), tmp_path)
    assert "resumed after" in _logs(tmp_path)
    rows, wanted = _rows(cut.run), _rows(unbroken)
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for name in ("samples_seen", "learning_rate", "loss/total", "gradient_norm"):
        # two ranks add in another order than four
        assert [row[name] for row in rows if name in row] == pytest.approx(
            [row[name] for row in wanted if name in row], rel=1e-4
        ), name


def test_four_ranks_train_as_on_one_host_when_they_are_two_on_each_of_two(
    hosts: list[Host], words: tuple[str, ...], launch: Any, tmp_path: Path
) -> None:
    short = (*words, "train.max_steps=2", f"output={tmp_path}")
    one = launch(*LAUNCH, "--ranks-per-node", 4, "--", *short, "name=one")
    assert one.returncode == 0, one.stderr[-3000:]
    _assert_all_end_well(hosts, _start(hosts, 2, (*short, "name=two"), tmp_path), tmp_path)
    assert len(_rows(tmp_path / "two")) >= 2
    assert _rows(tmp_path / "two") == _rows(tmp_path / "one")
    assert _results(tmp_path / "two") == _results(tmp_path / "one")
