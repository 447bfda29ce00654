"""``scinet compare`` as a user types it, with real trainings."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scinet.evaluation.metrics import evaluate
from tests.scinet.evaluation.comparison.conftest import Compare

pytestmark = pytest.mark.multiprocess
ROOT = Path(__file__).resolve().parents[4]
COMMAND = (sys.executable, "-m", "scinet.cli", "compare", "--config")
TABLES = {"comparison.json", "comparison.csv", "comparison.md", "comparison.html", "comparison-differences.svg"}
FILES = TABLES | {"facts.json", "cells", ".lock"}


def _cells(output: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in (output / "cells").glob("*.json")}


def _stamps(output: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (output / "cells").glob("[!.]*")}


def _tree(output: Path) -> Any:
    return json.loads((output / "comparison.json").read_text())


def _start(plan_file: Path, *more: object) -> subprocess.Popen[str]:
    command = [*COMMAND, str(plan_file), *map(str, more)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _workers(process: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True, check=False).stdout
    return [int(word) for word in found.split()]


def test_comparison_from_the_list_of_cells_to_the_recomputed_page(
    compare: Compare, plan_file: Path, tmp_path: Path, scenes: Path
) -> None:
    output = tmp_path / "out"
    status, listed, _ = compare(plan_file, "--dry-run")
    assert status == 0
    assert "0 of 6 cells are done, 3 trainings would run" in listed
    assert not output.exists()

    status, told, said = compare(plan_file, "--jobs", 2)
    assert status == 0, said
    assert {path.name for path in output.iterdir()} == FILES
    assert not list(output.rglob("*.part"))
    assert "Test-set peak" in told
    assert (output / "comparison.md").read_text() in told
    cells = _cells(output)
    assert len(cells) == 3  # the second name shares the cells of the first, zero-shot has one for all columns
    _check_figures(output, cells)
    rows = list(csv.DictReader((output / "comparison.csv").read_text().splitlines()))
    assert len(rows) == 6
    assert {row["state"] for row in rows} == {"done"}
    assert all(float(row["test_peak"]) >= float(row["selected"]) for row in rows)
    assert rows[0]["selected"] == rows[2]["selected"] != rows[4]["selected"]

    stamps, tree, page = _stamps(output), _tree(output), (output / "comparison.html").read_text()
    assert len(stamps) == 7
    status, _, said = compare(plan_file)
    assert (status, "to train" in said) == (0, False)
    assert _stamps(output) == stamps
    assert "6 of 6 cells are done, 0 trainings would run" in compare(plan_file, "--dry-run")[1]

    # neither data nor weights are needed for what is kept
    hidden = scenes.rename(scenes.with_name("hidden"))
    try:
        status, _, said = compare(plan_file, "--recompute")
    finally:
        hidden.rename(scenes)
    assert status == 0, said
    assert _tree(output) == tree
    assert (output / "comparison.html").read_text() == page
    status, _, said = compare(plan_file, "--recompute", "--seeds", "0,7")
    assert status == 2
    assert "--recompute lacks 4 of 12 cells (bce, 50% known, seed 7; bce, single, seed 7; bce again," in said
    assert _tree(output) == tree

    alone = plan_file.with_name("alone.yaml")
    alone.write_text(plan_file.read_text().replace("/out", "/alone").replace("test_peak: true\n", ""))
    status, _, said = compare(alone, "--jobs", 1, "--methods", "bce")
    assert status == 0, said
    _check_same(output, tmp_path / "alone")


def _check_figures(output: Path, cells: dict[str, Any]) -> None:
    """Everything that a cell says can be had from its predictions and the truth."""
    truth = load_file(next((output / "cells").glob("truth-*.safetensors")))["truth"]
    for name, cell in cells.items():
        kept = load_file((output / "cells" / name).with_suffix(".safetensors"))
        for moment in ("selected", "last"):
            assert kept[moment].dtype == torch.float32
            metrics = evaluate(kept[moment], truth)
            assert cell["judgements"][moment]["mean_average_precision"] == metrics.mean_average_precision
            assert cell["judgements"][moment]["class_f1"] == metrics.class_f1
        assert cell["course"]["num_epochs"] == (0 if cell["config"]["method"] == "zero_shot" else 2)
        assert cell["course"]["world"]["threads"] == 1
        assert cell["course"]["seconds"] > 0


def _check_same(output: Path, alone: Path) -> None:
    """Two jobs with the peak give what one gives without it, bit by bit."""
    names = {path.name for path in (alone / "cells").glob("[0-9a-f]*.safetensors")}
    assert len(names) == 2
    for name in names:
        two, one = (load_file(folder / "cells" / name) for folder in (output, alone))
        assert all(torch.equal(two[key], one[key]) for key in one)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_finished_cells_stay_and_no_process_when_it_is_interrupted(
    plan_file: Path, tmp_path: Path, number: int, status: int, own_environment: None
) -> None:
    output = tmp_path / "out"
    plan_file.write_text(plan_file.read_text().replace("seeds: [0]", "seeds: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]"))
    with _start(plan_file, "--jobs", 1, "--methods", "bce") as command:
        deadline = time.monotonic() + 120
        while not _cells(output) and time.monotonic() < deadline and command.poll() is None:
            time.sleep(0.05)
        workers = _workers(command.pid)
        command.send_signal(number)
        _, said = command.communicate(timeout=60)
    assert command.returncode == status, said
    assert workers
    for _ in range(50):
        if not any(Path(f"/proc/{worker}").exists() for worker in workers):
            break
        time.sleep(0.1)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert 0 < len(_cells(output)) < 20
    if status > 0:
        assert "of 20 cells were trained, they stay: the same command goes on" in said
        assert "Traceback" not in said


def test_other_cells_are_kept_and_the_failure_is_told_when_one_fails(
    compare: Compare, plan_file: Path, tmp_path: Path
) -> None:
    text = plan_file.read_text().replace("bce again: [method=bce,", "broken: [method=bce, model.attention_heads=7,")
    plan_file.write_text(text)
    status, _, said = compare(plan_file, "--methods", "bce,broken")
    assert status == 1
    last = said.strip().splitlines()[-1]
    assert last.startswith(
        "error: 2 cell(s) failed and are missing in the tables (broken, 50% known, seed 0: model.att"
    )
    states = {(cell["method"], cell["state"]) for cell in _tree(tmp_path / "out")["cells"]}
    assert states == {("bce", "done"), ("broken", "failed")}
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert "\N{EN DASH}" in table


def test_two_commands_share_the_cells_of_one_folder(plan_file: Path, tmp_path: Path, own_environment: None) -> None:
    with _start(plan_file, "--jobs", 1) as one, _start(plan_file, "--jobs", 1) as two:
        ends = [command.communicate(timeout=240) for command in (one, two)]
    assert [one.returncode, two.returncode] == [0, 0], ends
    assert len(_cells(tmp_path / "out")) == 3
    assert ends[0][0] == ends[1][0]  # the same tables


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--methods", "bse"), "'bse' is no method of this comparison; did you mean 'bce'"),
        (("--seeds", "0,x"), "--seeds is '0,x', expected whole numbers"),
        (("--dry-run", "--recompute"), "exclude each other"),
        (("--recompute",), "nothing was compared there yet"),
    ],
)
def test_command_is_refused_with_a_sentence_when_an_option_is_wrong(
    compare: Compare, plan_file: Path, arguments: tuple[str, ...], said: str
) -> None:
    status, _, told = compare(plan_file, *arguments)
    assert status == 2
    assert said in told


def test_command_is_refused_when_the_data_are_missing(compare: Compare, plan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("data: {path: nowhere}\n")
    status, _, said = compare(plan_file)
    assert status == 2
    assert "nowhere" in said
    assert not (tmp_path / "out").exists()
