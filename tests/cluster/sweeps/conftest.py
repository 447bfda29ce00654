"""A sweep without trainings: its configuration and an agenda whose trials end as the test says."""

from __future__ import annotations

from pathlib import Path

import pytest

from scinet_cluster.sweeps import options
from scinet_cluster.sweeps.options import Sweep

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """The shipped sweep with four trials, in a folder of its own."""
    words = [f"output={tmp_path}", "trials=4", "confirm.top=1", "confirm.seeds=2"]
    made = options.load(ROOT / "configs/sweeps/loss_weights.yaml", words)
    made.folder.mkdir(parents=True)
    return made
