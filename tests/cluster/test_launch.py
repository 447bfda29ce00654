"""The launcher as a command: statuses, signals, and that no rank outlives it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from scinet_cluster import launch

pytestmark = pytest.mark.multiprocess

T = TypeVar("T")
LAUNCH = (sys.executable, "-m", "scinet_cluster.launch")
_RANK = """
import os, signal, subprocess, sys, time
folder, rank = sys.argv[1], os.environ["RANK"]
number = len([name for name in os.listdir(folder) if name.startswith(f"pid-{rank}-")])
def note(kind, text):
    with open(f"{folder}/{kind}-{rank}-{number}.part", "w") as file:
        file.write(str(text))
    os.rename(f"{folder}/{kind}-{rank}-{number}.part", f"{folder}/{kind}-{rank}-{number}")
told = []
def hear(word, status):
    def heard(signum, frame):
        told.append(word)
        note("heard", " ".join(told))
        if status is not None:
            time.sleep(0.2)
            sys.exit(status)
    return heard
exec(sys.argv[2])
note("pid", os.getpid())
exec(sys.argv[3])
"""
SAVES = "signal.signal(signal.SIGTERM, hear('TERM', 143)); signal.signal(signal.SIGINT, hear('INT', 130))"
DEAF = "signal.signal(signal.SIGTERM, hear('TERM', None)); signal.signal(signal.SIGINT, hear('INT', None))"
LASTS = "time.sleep(60)\nwhile True: time.sleep(1)"


class Launched:
    """``scinet-launch`` with ranks that are told what to do, and the notes they write."""

    def __init__(self, folder: Path, *options: str, before: str = "", then: str) -> None:
        self.folder = folder
        script = folder / "rank.py"
        script.write_text(_RANK)
        command = [*LAUNCH, *options, "--", str(script), str(folder), before, then]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def await_notes(self, kind: str, number: int) -> list[str]:
        return _eventually(lambda: [path.read_text() for path in self._notes(kind)], lambda found: len(found) >= number)

    def _notes(self, kind: str) -> list[Path]:
        return sorted(path for path in self.folder.glob(f"{kind}-*") if path.suffix != ".part")

    def end(self, timeout_s: float = 30) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err

    def alive(self) -> list[int]:
        return [int(path.read_text()) for path in self._notes("pid") if _is_alive(int(path.read_text()))]


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _eventually(look: Callable[[], T], enough: Callable[[T], bool], timeout_s: float = 20) -> T:
    end = time.monotonic() + timeout_s
    while not enough(found := look()):
        assert time.monotonic() < end, found
        time.sleep(0.01)
    return found


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    started: list[Launched] = []

    def start(*options: str, before: str = "", then: str) -> Launched:
        started.append(Launched(tmp_path, *options, before=before, then=then))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()
        for pid in one.alive():
            os.kill(pid, signal.SIGKILL)


def test_ranks_know_their_places_and_write_untouched(launched: Callable[..., Launched]) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR GLOO_SOCKET_IFNAME"
    # one write a line: both ranks have the same pipe, and print makes several of an unbuffered line
    told = f"' '.join(os.environ[name] for name in {names!r}.split()) + chr(10)"
    one = launched(
        *("--nodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--ranks-per-node", "2"),
        then=f"os.write(1, ({told}).encode()); os.write(2, b'to stderr' + bytes([10]))",
    )
    status, out, err = one.end()
    assert status == 0
    assert sorted(out.splitlines()) == ["2 0 4 2 127.0.0.1 lo", "3 1 4 2 127.0.0.1 lo"]
    assert err == "to stderr\n" * 2, "the launcher adds nothing to a run that ends well"


def test_interface_is_the_users_when_the_environment_names_one(
    launched: Callable[..., Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    one = launched(
        "--ranks-per-node", "1", then="print(os.environ['GLOO_SOCKET_IFNAME'], os.environ['OMP_NUM_THREADS'])"
    )
    assert one.end()[:2] == (0, "ib0 7\n")


@pytest.mark.parametrize(
    ("statuses", "line"),
    [
        ((142, 2), "rank 1 {} ended with status 2: the command or its configuration is wrong"),
        ((1, 2), "rank 1 {} ended with status 2: the command"),
        ((143, 1), "rank 1 {} ended with status 1: it failed in a way that a restart repeats"),
        ((0, 142), "rank 1 {} ended with status 142: another rank was lost or hung; with --resume auto"),
        ((-9, 0), "rank 0 {} ended with status 137: killed by SIGKILL; with --resume auto"),
        ((126, 143), "rank 0 {} ended with status 126: it failed"),
    ],
)
def test_status_is_the_most_informative_of_the_ranks(
    launched: Callable[..., Launched], statuses: tuple[int, int], line: str
) -> None:
    then = f"""
status = {statuses}[int(rank)]
time.sleep(0.3 * int(rank))  # the first of them ends first
os.kill(os.getpid(), -status) if status < 0 else sys.exit(status)
"""
    status, _, err = launched("--ranks-per-node", "2", then=then).end()
    assert err.startswith("scinet-launch: " + line.format(f"on {socket.gethostname()}"))
    assert len(err.splitlines()) == 1
    assert f"status {status}: " in line


@pytest.mark.parametrize(("number", "word", "status"), [(signal.SIGTERM, "TERM", 143), (signal.SIGINT, "INT", 130)])
def test_every_rank_hears_a_signal_once_and_may_save_when_the_launcher_gets_it(
    launched: Callable[..., Launched], number: signal.Signals, word: str, status: int
) -> None:
    one = launched("--ranks-per-node", "3", "--restarts", "5", before=SAVES, then=LASTS)
    one.await_notes("pid", 3)
    one.process.send_signal(number)
    one.process.send_signal(number)
    ended, _, err = one.end()
    assert ended == status
    assert one.await_notes("heard", 3) == [word] * 3
    assert "starting again" not in err, "told to stop, it does not start again"
    assert one.alive() == []


def test_ranks_are_killed_when_they_outlast_the_grace(launched: Callable[..., Launched]) -> None:
    one = launched("--ranks-per-node", "2", "--grace", "5", before=DEAF, then=LASTS)
    one.await_notes("pid", 2)
    one.process.send_signal(signal.SIGINT)
    told = time.monotonic()
    one.await_notes("heard", 2)
    time.sleep(3)
    one.process.send_signal(signal.SIGTERM)  # another signal goes on too, but the grace does not begin anew
    status, _, err = one.end()
    assert (status, one.alive()) == (137, [])
    assert 5 <= time.monotonic() - told < 8
    assert "SIGKILL" in err
    assert one.await_notes("heard", 2) == ["INT TERM"] * 2


def test_processes_that_a_rank_started_end_with_it(launched: Callable[..., Launched]) -> None:
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], stdout=subprocess.DEVNULL)"
    one = launched(then=f"child = {child}; note('child', child.pid); sys.exit(1)")
    status, _, _ = one.end()
    assert status == 1
    (pid,) = one.await_notes("child", 1)
    _eventually(lambda: _is_alive(int(pid)), lambda is_alive: not is_alive)  # killed, it takes a moment to be gone


def test_others_are_stopped_when_a_rank_has_failed_and_they_go_on(launched: Callable[..., Launched]) -> None:
    before = f"if rank != '0':\n    {SAVES}"
    one = launched("--ranks-per-node", "2", before=before, then=f"if rank == '0': sys.exit(1)\n{LASTS}")
    status, _, err = one.end()
    assert status == 1, "not 143, which is what the other said"
    assert "rank 0" in err
    assert one.await_notes("heard", 1) == ["TERM"]


def test_ranks_hear_sigterm_when_the_launcher_is_killed(launched: Callable[..., Launched]) -> None:
    one = launched("--ranks-per-node", "2", before=SAVES, then=LASTS)
    one.await_notes("pid", 2)
    one.process.kill()
    assert one.await_notes("heard", 2) == ["TERM"] * 2
    _eventually(one.alive, lambda pids: pids == [])


def test_ranks_are_stopped_when_the_launcher_is_the_first_process_of_a_container(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(_RANK)
    alone = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    command = (*alone, *LAUNCH, "--ranks-per-node", "2", "--", str(script), str(tmp_path), SAVES, LASTS)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            _eventually(lambda: list(tmp_path.glob("pid-?-0")), lambda found: len(found) == 2)
            (first,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(first), signal.SIGTERM)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 143, err
    assert len(list(tmp_path.glob("heard-?-0"))) == 2


def test_all_ranks_start_again_when_a_status_says_that_it_helps(launched: Callable[..., Launched]) -> None:
    then = "sys.exit(0 if number == 2 else 142 if rank == '1' else 0)"
    status, _, err = launched("--ranks-per-node", "2", "--restarts", "3", then=then).end()
    assert status == 0
    assert [line for line in err.splitlines() if "starting again" in line] == [
        "scinet-launch: starting again, 2 restart(s) left after this",
        "scinet-launch: starting again, 1 restart(s) left after this",
    ]


@pytest.mark.parametrize(("status", "starts"), [(1, 1), (2, 1), (142, 3)])
def test_starts_are_counted_when_every_one_of_them_fails(
    launched: Callable[..., Launched], status: int, starts: int
) -> None:
    one = launched("--restarts", "2", "--ranks-per-node", "1", then=f"sys.exit({status})")
    assert one.end()[0] == status
    assert len(one.await_notes("pid", starts)) == starts


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--", "tests/cluster/test_lunch.py"), "did you mean 'tests/cluster/test_launch.py'?"),
        (("scinet/train.py",), "no training command after `--`"),
        (("--node-rnk", "1", "--", "scinet/train.py"), "unknown option --node-rnk; did you mean '--node-rank'?"),
        (("--config", "f.yaml", "--", "scinet/train.py"), "unknown option --config"),
        (("--grace", "nan", "--", "scinet/train.py"), "--grace is nan, but must be at least 0"),
        (("--ranks-per-node", "0", "--", "scinet/train.py"), "--ranks-per-node is 0, but must be at least 1"),
        (
            ("--nodes", "2", "--node-rank", "0", "--master-addr", "a", "--restarts", "1", "--", "scinet/train.py"),
            "--restarts 1 is for one node, but 2 train together",
        ),
    ],
)
def test_usage_is_refused_in_one_sentence_when_it_is_wrong(
    words: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    assert launch.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert complaint in line


def test_launcher_is_installed_as_a_command() -> None:
    installed = Path(sys.executable).parent / "scinet-launch"
    done = subprocess.run([installed, "--help"], capture_output=True, text=True, check=True)
    assert "--hostfile" in done.stdout
