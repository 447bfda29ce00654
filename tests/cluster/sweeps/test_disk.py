"""What stays of a sweep's trials on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from scinet.errors import ConfigError
from scinet_cluster.sweeps import disk
from scinet_cluster.sweeps.ledger import Ledger, Purpose, State, Trial


def _trial(ledger: Ledger, folder: Path, number: int, value: float | None, state: State) -> Path:
    history = [] if value is None else [(1, value)]
    ledger.write(Trial(number, Purpose.search, number, 0, {}, state, history))
    checkpoints = folder / f"trials/{number:04d}/checkpoints"
    for name in ("step-0000000004", ".step-0000000008.part", "selected"):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "weights").write_bytes(bytes(8192))
    return checkpoints


def test_weights_of_the_best_and_all_of_those_that_go_on_stay(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "trials.jsonl")
    states = [State.completed, State.stopped, State.begun, State.failed, State.completed]
    values = (40.0, 60.0, 90.0, None, 50.0)
    found = [
        _trial(ledger, tmp_path, number, value, state)
        for number, (value, state) in enumerate(zip(values, states, strict=True))
    ]
    disk.prune(tmp_path, ledger, keep_weights=2)
    left = [sorted(path.name for path in checkpoints.iterdir()) for checkpoints in found]
    assert left == [[], ["selected"], [".step-0000000008.part", "selected", "step-0000000004"], [], ["selected"]]
    assert disk.used(tmp_path) >= 5 * 8192
    assert disk.largest(tmp_path, [ledger.trials[0], ledger.trials[2]]).startswith("trial 2: ")


def test_budget_is_refused_when_the_disk_has_less(tmp_path: Path) -> None:
    disk.check(tmp_path, 2**20)
    with pytest.raises(ConfigError, match=r"'resources\.disk_budget_gb' is 1\.04858e\+06, but .* has room for"):
        disk.check(tmp_path, 2**50)
