"""The communication plan is held against what ranks really hand to torch.distributed."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

WORKER = Path(__file__).parent / "worker_traffic.py"
# four ranks differ from two in the ring only
KINDS = {2: ("bf16", "accumulated", "zoo"), 4: ("accumulated",)}
Rows = dict[str, dict[str, dict[str, int]]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, launch: Any, on_features: tuple[str, ...]) -> dict[int, Rows]:
    """Bytes sent and planned, by ranks, stage and kind; every weight has a use and a gradient."""
    words = (
        *on_features,
        "model.bi_dominant=none",
        "train.global_batch_size=16",
    )
    found = {}
    for ranks, kinds in KINDS.items():
        out = tmp_path_factory.mktemp("traffic")
        done = launch("torchrun", "--nproc-per-node", ranks, WORKER, out, ",".join(kinds), *words, timeout_s=500)
        assert done.returncode == 0, done.stderr[-3000:]
        found[ranks] = json.loads((out / "rows.json").read_text())
    return found


@pytest.mark.parametrize(
    ("ranks", "stage", "kind"),
    [(ranks, stage, kind) for ranks, kinds in KINDS.items() for stage, kind in product(range(4), kinds)],
)
def test_bytes_sent_are_those_planned(rows: dict[int, Rows], ranks: int, stage: int, kind: str) -> None:
    row = rows[ranks][f"{stage}-{kind}"]
    assert row["sent"] == row["planned"]
