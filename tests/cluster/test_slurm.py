"""``train.sbatch``: by shellcheck, and what it does after each end, with stand-ins for Slurm's commands.

On a real Slurm it is tried by hand: ``trial_slurm.py``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scinet_cluster import launch

SCRIPT = Path(__file__).resolve().parents[2] / "cluster/slurm/train.sbatch"
_SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
worst=0
for SLURM_NODEID in 0 1; do
    export SLURM_NODEID
    "$@" || { status=$?; [ $status -gt $worst ] && worst=$status; }
done
exit $worst
"""
_LAUNCH = """#!/bin/bash
echo "$*" >>launched
read -ra statuses <<<"$STATUSES"
status=${statuses[$SLURM_NODEID]}
# a node that --kill-on-bad-exit kills writes no status
[ "$status" = killed ] && { kill -9 $PPID; exit 137; }
exit "$status"
"""
_SCONTROL = '#!/bin/bash\necho "$*" >>requeued\n'


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", _SRUN), ("scinet-launch", _LAUNCH), ("scontrol", _SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    return tmp_path


def _run(folder: Path, statuses: str, *words: str) -> tuple[int, list[str]]:
    environment = {**os.environ, "STATUSES": statuses}
    done = subprocess.run(["bash", SCRIPT, *words], cwd=folder, env=environment, check=False, capture_output=True)
    path = folder / "requeued"
    return done.returncode, path.read_text().splitlines() if path.exists() else []


def test_script_is_clean_by_shellcheck() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_job_has_time_to_save_before_its_limit() -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SCRIPT.read_text(), flags=re.M))
    assert "requeue" in options
    assert options["open-mode"] == "append"
    assert options["ntasks-per-node"] == "1"
    name, seconds = options["signal"].split("@")
    assert name == "TERM", "to the tasks, not to the script (B:)"
    grace = launch.parse(["--grace", re.findall(r"--grace (\d+)", SCRIPT.read_text())[0], "--", __file__]).grace_s
    assert int(seconds) > grace


@pytest.mark.parametrize(
    ("statuses", "status", "is_requeued"),
    [
        ("0 0", 0, False),
        ("143 143", 143, True),
        ("142 137", 142, True),
        ("142 1", 1, False),
        ("1 2", 2, False),
        ("2 143", 2, False),
        ("1 killed", 1, False),
        ("killed 127", 127, False),
        ("killed 142", 137, True),
    ],
)
def test_job_goes_back_into_the_queue_only_when_no_node_says_that_it_would_end_the_same_way(
    slurm: Path, statuses: str, status: int, is_requeued: bool
) -> None:
    ended, requeued = _run(slurm, statuses)
    assert requeued == (["requeue 77"] if is_requeued else [])
    assert ended == status or (is_requeued and ended >= 128)
    assert not list(slurm.glob(".scinet-*")), "nothing is left in the clone"


def test_job_ends_when_it_was_in_the_queue_too_often(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "50")
    assert _run(slurm, "143 143") == (143, [])


def test_words_reach_the_training_command_unchanged(slurm: Path) -> None:
    assert _run(slurm, "0 0", "--config", "a b.yaml", "name=x")[0] == 0
    want = "--grace 90 -- scinet/train.py --resume auto --config a b.yaml name=x"
    assert (slurm / "launched").read_text().splitlines() == [want] * 2
