"""A comparison is the grid that its file says, and a cell's key holds what can change its result, nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scinet import config
from scinet.errors import ConfigError
from scinet.evaluation import compare
from scinet.evaluation.compare import Cell, Plan

PLAN = """
output: out
base: base.yaml
methods:
  scinet: []
  bce: [method=bce]
known_ratios: [0.1, 0.5]
seeds: [0, 1]
"""


def _plan(folder: Path, text: str = PLAN) -> Plan:
    (folder / "base.yaml").write_text("train: {epochs: 3}\n")
    (folder / "plan.yaml").write_text(text)
    return compare.read_plan(folder / "plan.yaml")


def test_grid_is_every_method_ratio_and_seed_under_one_base(tmp_path: Path) -> None:
    cells = list(compare.expand(_plan(tmp_path)))
    assert len({(cell.method, cell.known_ratio, cell.seed) for cell in cells}) == len(cells) == 8
    for cell in cells:
        options = cell.options
        assert options.method.value == cell.method
        assert options.data.known_ratio == cell.known_ratio
        assert options.seed == options.data.mask_seed == cell.seed
        assert options.train.epochs == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PLAN.replace("seeds", "seed"), "unknown key 'seed'; did you mean 'seeds'"),
        (PLAN.replace("output: out", ""), "has no 'output'"),
    ],
)
def test_plan_is_refused_when_a_key_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _plan(tmp_path, text)


def test_grid_is_refused_when_an_override_is_wrong(tmp_path: Path) -> None:
    plan = _plan(tmp_path, PLAN.replace("method=bce", "metthod=bce"))
    with pytest.raises(ConfigError, match="did you mean 'method'"):
        list(compare.expand(plan))


@pytest.mark.parametrize(
    ("method", "change", "is_same"),
    [
        ("scinet", "name=other", True),
        ("scinet", "fusion.momentum=0.5", False),
        ("bce", "fusion.momentum=0.5", True),
        ("bce", "data.known_ratio=0.7", False),
        ("bce", "seed=3", False),
        ("bce", "correlation.graph_top_k=3", False),  # baselines have the label graph too
    ],
)
def test_cell_is_another_when_its_result_can_differ(method: str, change: str, is_same: bool) -> None:
    before, after = (
        config.to_yaml(compare._neutral(config.load(None, [f"method={method}", *own]))) for own in ([], [change])
    )
    assert (before == after) == is_same


def _result(value: float) -> dict[str, Any]:
    return {"test_map": value, "last_map": value - 1}


def test_table_shows_mean_and_standard_deviation_over_seeds(tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    cells: list[Cell] = list(compare.expand(plan))
    values = {("scinet", 0.1): (60, 64), ("scinet", 0.5): (80, 80), ("bce", 0.1): (50, 51), ("bce", 0.5): (70, 72)}
    table = compare.summarise(
        plan, cells, [_result(values[cell.method, cell.known_ratio][cell.seed]) for cell in cells]
    )
    row = next(row for row in table["rows"] if row["method"] == "scinet" and row["known_ratio"] == 0.1)
    assert row["num_seeds"] == 2
    assert (row["test_map"], row["last_map"]) == (62, 61)
    assert row["test_map_std"] == pytest.approx(8**0.5)  # of a sample, n - 1
    assert compare.to_markdown(table).splitlines() == [
        "| method | 10% known | 50% known |",
        "| --- | --- | --- |",
        "| scinet | 62.00 +- 2.83 | 80.00 +- 0.00 |",
        "| bce | 50.50 +- 0.71 | 71.00 +- 1.41 |",
    ]


@pytest.mark.multiprocess
def test_workers_end_when_the_command_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "pool.py"
    script.write_text(
        "import multiprocessing, os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from scinet.evaluation import compare\n"
        "if __name__ == '__main__':\n"
        "    spawn = multiprocessing.get_context('spawn')\n"
        "    pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=compare._start_worker)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 300).result()\n",
        encoding="utf-8",
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        worker = int(command.stdout.readline())
        command.kill()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.1)
    os.kill(worker, 9)
    pytest.fail("the worker outlived the command")
