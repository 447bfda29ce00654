"""One process writes a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scinet import rundir
from scinet.errors import ConfigError
from scinet.options import Options

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


def test_nothing_is_left_when_a_run_never_started(run: rundir.RunDirectory) -> None:
    with rundir.locked(run):
        rundir.discard_if_never_started(run)
    assert not run.path.exists()
