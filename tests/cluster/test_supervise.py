"""What ranks are told of their places, and which of their statuses is the launcher's; processes: test_launch.py."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest

from scinet.errors import ConfigError
from scinet_cluster import launch, supervise
from scinet_cluster.launch import Job
from scinet_cluster.nodes import Nodes, Wish
from scinet_cluster.supervise import Outcome


def _outcome(*ended: tuple[int, int]) -> tuple[int, int | None]:
    """Give numbers and statuses of ranks in the order of their ends."""
    ranks = [supervise._Rank(number, cast("subprocess.Popen[bytes]", None), status) for number, status in ended]
    return supervise._most_informative(ranks)


@pytest.mark.parametrize(
    ("ended", "expected"),
    [
        ([(0, 0), (1, 0)], (0, None)),
        ([(1, 142), (0, 0)], (142, 1)),
        ([(1, 137), (0, 142)], (137, 1)),  # the first to end is the cause
        ([(0, 142), (1, 137)], (142, 0)),
        ([(0, 143), (1, 1)], (1, 1)),  # what a restart repeats
        ([(0, 1), (1, 2), (2, 137)], (2, 1)),
        ([(0, 127), (1, 128)], (127, 0)),
        ([(3, 1), (2, 5)], (1, 3)),
    ],
)
def test_status_is_the_most_informative(ended: list[tuple[int, int]], expected: tuple[int, int | None]) -> None:
    assert _outcome(*ended) == expected


def _job(restarts: int = 0) -> Job:
    return Job(Wish(), ("scinet/train.py", "name=x"), 90.0, restarts, None)


def test_ranks_of_the_second_node_count_on_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": "/bin"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    starts = launch._starts(_job(), Nodes((3, 2, 4), 1, "10.0.0.1", 29512, None))
    assert [start.rank for start in starts] == [3, 4]
    for local, start in enumerate(starts):
        assert list(start.command)[1:] == ["scinet/train.py", "name=x"]
        assert start.environment == {
            "PATH": "/bin",
            "RANK": str(3 + local),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": "9",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "10.0.0.1",
            "MASTER_PORT": "29512",
            "OMP_NUM_THREADS": "4",
        }


def test_threads_and_interface_are_the_users_when_he_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interface_towards", lambda host: f"way to {host}")
    nodes = Nodes((1, 1), 0, "a", 1, "b")
    assert launch._shared_environment(nodes, {})["GLOO_SOCKET_IFNAME"] == "way to b"
    own = launch._shared_environment(nodes, {"GLOO_SOCKET_IFNAME": "eth7", "OMP_NUM_THREADS": "3"})
    assert (own["GLOO_SOCKET_IFNAME"], own["OMP_NUM_THREADS"]) == ("eth7", "3")


@pytest.mark.parametrize(
    ("outcomes", "restarts", "starts", "status"),
    [
        ([(142, False), (137, False), (0, False)], 3, 3, 0),
        ([(142, False)] * 3, 2, 3, 142),
        ([(128, False), (0, False)], 1, 2, 0),
        ([(1, False)], 3, 1, 1),
        ([(2, False)], 3, 1, 2),
        ([(143, True)], 3, 1, 143),  # the launcher was told to stop
        ([(142, False)], 0, 1, 142),
    ],
)
def test_ranks_start_again_as_long_as_that_helps(
    monkeypatch: pytest.MonkeyPatch, outcomes: list[tuple[int, bool]], restarts: int, starts: int, status: int
) -> None:
    coming, begun = list(outcomes), []

    def run_ranks(made: Any, *, grace_s: float) -> Outcome:
        begun.append((len(made), grace_s))
        found, is_stopped = coming.pop(0)
        return Outcome(found, 0 if found else None, is_stopped)

    monkeypatch.setattr(launch, "find", lambda *_: Nodes((2,), 0, "127.0.0.1", None, None))
    monkeypatch.setattr(launch, "run_ranks", run_ranks)
    assert launch._run(_job(restarts)) == status
    assert begun == [(2, 90.0)] * starts


def test_restarts_are_refused_for_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find", lambda *_: Nodes((1, 1), 0, "a", 1, "b"))
    with pytest.raises(ConfigError, match="--restarts 1 is for one node, but 2 train together"):
        launch._run(_job(1))


def test_every_node_counts_its_own_gpus_or_runs_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[str] = []

    def run_ranks(made: Any, *, grace_s: float) -> Outcome:
        sizes.extend(start.environment["WORLD_SIZE"] for start in made)
        return Outcome(0, None, False)

    monkeypatch.setattr(launch, "run_ranks", run_ranks)
    for gpus in (0, 3):
        monkeypatch.setattr(launch, "find", lambda *_: Nodes((0,), 0, "127.0.0.1", None, None))
        monkeypatch.setattr(launch, "_num_gpus", lambda gpus=gpus: gpus)
        assert launch._run(_job()) == 0
    assert sizes == ["1", "3", "3", "3"]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (1, "it failed in a way that a restart repeats"),
        (7, "it failed in a way that a restart repeats"),
        (2, "the command or its configuration is wrong"),
        (130, "interrupted; with --resume auto the same command goes on"),
        (142, "another rank was lost or hung; with --resume auto the same command goes on"),
        (143, "stopped by SIGTERM; with --resume auto the same command goes on"),
        (137, "killed by SIGKILL; with --resume auto the same command goes on"),
        (128 + 100, "killed by signal 100; with --resume auto the same command goes on"),
    ],
)
def test_meaning_of_a_status_is_said(capsys: pytest.CaptureFixture[str], status: int, said: str) -> None:
    launch._say(Outcome(status, 4, False))
    line = capsys.readouterr().err
    assert "rank 4 on " in line
    assert line.endswith(f"ended with status {status}: {said}\n")


@pytest.mark.parametrize(
    ("option", "lowest"),
    [("--ranks-per-node", 1), ("--master-port", 1), ("--grace", 0), ("--restarts", 0), ("--parent", 1)],
)
def test_number_is_refused_below_its_lowest(tmp_path: Path, option: str, lowest: int) -> None:
    script = tmp_path / "train.py"
    script.touch()
    launch.parse([option, str(lowest), "--", str(script)])
    with pytest.raises(ConfigError, match=f"{option} is {lowest - 1}, but must be at least {lowest}"):
        launch.parse([option, str(lowest - 1), "--", str(script)])
