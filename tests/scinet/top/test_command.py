"""``scinet top``: what it shows at which width, how it ends, and whose mistakes it says in a sentence."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path
from signal import SIGINT

import pytest
from rich.console import Console

from scinet import cli
from scinet.options import Options
from scinet.rundir import RunDirectory
from scinet.top.screen import screen
from scinet.top.watch import Watch
from tests.scinet.top.conftest import FIGURES, Serve, announce, begun, ok

PATIENCE_S = 60


@pytest.fixture
def top(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """``top("runs/one")``: the console command, inside this process."""
    monkeypatch.delenv("COLUMNS", raising=False)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["scinet", "top", *map(str, words)])
        status = cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return call


def test_one_run_is_shown_with_its_losses_and_ranks(top, run: RunDirectory, serve: Serve) -> None:  # type: ignore[no-untyped-def]
    announce(run, f"127.0.0.1:{serve(ok(FIGURES))}")
    status, out, err = top(run.path)
    assert (status, err) == (0, "")
    for word in ("one", "training", "13/50", "40.0", "0.25", "50.0/55.0", "1/2", "3.0 GiB", "25%", "1:58"):
        assert word in out
    assert "loss: total 0.2500  supervised 0.1667" in out
    assert [line.split() for line in out.splitlines()[-2:]] == [
        ["0", "up", "-", "-", "3.0", "GiB", "alpha"],
        ["1", "silent", "-", "-", "-", "beta"],
    ]


def test_several_runs_are_shown_and_those_that_live_come_first(top, run: RunDirectory, serve: Serve) -> None:  # type: ignore[no-untyped-def]
    finished = begun(run.path.parent, "a-finished-one")
    finished.evaluation.write_text("{}")
    announce(run, f"127.0.0.1:{serve(ok(FIGURES))}")
    (run.path.parent / "notes").mkdir()
    status, out, _ = top(*sorted(run.path.parent.glob("[!.]*")))
    lines = out.splitlines()
    assert status == 0
    assert [line.split()[:3] for line in lines[2:4]] == [
        ["one", "training", "13/50"],
        ["a-finished-one", "finished", "12/12"],
    ]
    assert lines[4].startswith("not shown: ")
    assert "notes is no run directory" in lines[4]
    assert "loss:" not in out


def test_all_runs_under_runs_are_shown_when_none_is_named(  # type: ignore[no-untyped-def]
    top, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.path.parent.parent)
    begun(run.path.parent, "two")
    (run.path.parent / "notes").mkdir()
    status, out, _ = top()
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["one", "two"]


def test_runs_of_the_same_name_are_shown_with_their_folders(top, run: RunDirectory, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    other = begun(tmp_path / "b", "one")
    _, out, _ = top(run.path, other.path)
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["runs/one", "b/one"]


def test_run_is_shown_before_it_has_a_configuration(top, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    early = RunDirectory(tmp_path / "early")
    early.checkpoints.mkdir(parents=True)
    early.lock.touch()
    status, out, _ = top(early.path)
    assert status == 0
    assert "early" in out


def test_mistakes_are_said_in_a_sentence(top, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    status, out, err = top(run.path.parent / "onne")
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert "onne is no run directory" in err
    assert f"did you mean '{run.path}'?" in err
    monkeypatch.chdir(run.path)
    assert top() == (1, "", "error: there is no run in runs: name one\n")
    run.config.write_text("train: {epoch: 3}\n")
    status, _, err = top(run.path)
    assert status == 2
    assert "did you mean 'train.epochs'?" in err
    assert [top("--interval", value)[0] for value in (0, "inf", "soon")] == [2, 2, 2]


def test_what_strangers_write_is_shown_without_obeying_it(top, run: RunDirectory, serve: Serve) -> None:  # type: ignore[no-untyped-def]
    evil = begun(run.path.parent, "e\x1b[2Jvil[red]\n\u202e")
    with evil.metrics.open("a") as file:
        file.write(json.dumps({"step": 1e14, "loss/\x1b[31m[bold]": 1e14, "loss/total": -1e-300}) + "\n")
    name = json.dumps(evil.path.name)[1:-1].replace("\\u001b", "\x1b").replace("\\u202e", "\u202e")
    figures = FIGURES.replace('run="one"', f'run="{name}"').replace("alpha", "\x1b]0;alpha\x07[/red]" * 9)
    announce(evil, f"127.0.0.1:{serve(ok(figures))}")
    status, out, _ = top(evil.path)
    assert status == 0
    assert not set("\x1b\x07\u202e") & set(out)
    assert "e\\x1b[2Jvil[red]\\n\\u202e" in out
    assert "\\x1b]0;alpha\\x07[/red]" in out


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("epochs: 10", f"epochs: {10**400}"),
        ("global_batch_size: 128", f"global_batch_size: {10**400}"),
        ("evaluate_every_epochs: 1", f"evaluate_every_epochs: {10**400}"),
        ("max_steps: 0", f"max_steps: {10**400}"),
        ("hang_timeout_s: 300.0", "hang_timeout_s: .inf"),
    ],
)
def test_configurations_out_of_all_bounds_are_survived(
    top, run: RunDirectory, serve: Serve, old: str, new: str
) -> None:  # type: ignore[no-untyped-def]
    text = run.config.read_text()
    assert old in text
    run.config.write_text(text.replace(old, new))
    for planned in ("50.0", "0.0", "-1.0", "1e300", "9e14"):
        figures = FIGURES.replace("planned_steps 50.0", f"planned_steps {planned}")
        announce(run, f"127.0.0.1:{serve(ok(figures))}")
        assert top(run.path)[0] in (0, 2)


class Terminal:
    """``scinet top`` on a terminal of its own."""

    def __init__(self, columns: int, *words: object) -> None:
        self._leader, self._follower = pty.openpty()
        fcntl.ioctl(self._follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._before = termios.tcgetattr(self._follower)
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scinet.cli", "top", *map(str, words)],
            stdin=self._follower,
            stdout=self._follower,
            stderr=self._follower,
            env={**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._follower)
        os.close(self._leader)

    def read_until(self, word: str) -> str:
        end = time.monotonic() + PATIENCE_S
        while word not in self.text:
            assert time.monotonic() < end, self.text
            self.text += os.read(self._leader, 1 << 16).decode()
        return self.text

    def write(self, keys: bytes) -> None:
        os.write(self._leader, keys)

    def end(self) -> int:
        """Return the exit status of a command that leaves the terminal as it found it."""
        status = self.process.wait(PATIENCE_S)
        assert termios.tcgetattr(self._follower) == self._before
        return status


@pytest.mark.parametrize("key", ["q", "Ctrl-C"])
def test_live_view_follows_a_run_until_a_key(run: RunDirectory, serve: Serve, key: str) -> None:
    announce(run, f"127.0.0.1:{serve(ok(FIGURES))}")
    with Terminal(80, run.path, begun(run.path.parent, "n" * 30).path, "--interval", 0.2) as terminal:
        terminal.read_until("13/50")
        with run.metrics.open("a") as file:
            file.write(json.dumps({"step": 13, "loss/total": 0.125}) + "\n")
        terminal.read_until("0.125")
        if key == "q":
            terminal.write(b"xq")
        else:
            terminal.process.send_signal(SIGINT)
        assert terminal.end() == 0


def test_one_table_is_printed_on_a_terminal_when_it_is_asked_for_once(run: RunDirectory) -> None:
    with Terminal(80, run.path, "--once") as terminal:
        terminal.read_until("supervised")
        assert terminal.end() == 0


@pytest.mark.parametrize(
    ("columns", "shown", "left_out"),
    [
        (200, {"", "memory", "wait", "eta", "loss", "mAP/best", "samples/s", "ranks"}, set()),
        (80, {"eta", "loss", "mAP/best", "samples/s", "ranks"}, {"memory"}),
        (40, {"ranks"}, {"eta", "loss", "mAP/best", "wait", "memory"}),
        (20, set(), {"samples/s", "ranks"}),
    ],
)
def test_columns_give_way_when_the_terminal_is_narrow(
    run: RunDirectory, serve: Serve, columns: int, shown: set[str], left_out: set[str]
) -> None:
    announce(run, f"127.0.0.1:{serve(ok(FIGURES))}")
    looks = [Watch(run, Options(name="one")).look(), replace(Watch(run, Options()).look(), name="n" * 30)]
    console = Console(width=columns, force_terminal=True, file=io.StringIO(), color_system=None)
    console.print(screen(looks, [], console))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 4, "no line is folded"
    assert {"run", "state", *shown} <= {"", *lines[0].split()}
    assert not left_out & set(lines[0].split())
    assert "…" not in lines[2]
    assert lines[2].split()[:2] == ["one", "training"]
