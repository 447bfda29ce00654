"""``scinet bench`` as a user types it, on sizes that take seconds; what it measures is no matter of a test."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scinet.zoo.catalogue import METHODS

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--sizes", 256, "--width", 8, "--columns", 4, "--repeats", 1, "--threads", 1, "--device", "cpu")


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_bench_fusion_prints_a_table_and_writes_the_same_rows_as_json(scinet: Any, tmp_path: Path) -> None:
    result = scinet("bench", "fusion", *TINY, "--no-memory", "--json", tmp_path / "rows.json")
    assert result.status == 0, result.err
    assert result.err.splitlines() == [
        "propagate, 256 rows, forward",
        "propagate, 256 rows, forward + backward",
        "pearson, 256 rows, forward",
    ]
    header, _, *lines = _table(result.out)
    assert header[:4] == ["operator", "rows", "pass", "contestant"]
    whole = json.loads((tmp_path / "rows.json").read_text())
    assert [line[3] for line in lines] == [row["contestant"] for row in whole["rows"]]
    assert {(line[0], line[2]) for line in lines} == {
        ("propagate", "forward"),
        ("propagate", "forward + backward"),
        ("pearson", "forward"),
    }
    assert whole["environment"]["threads"] == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.json"]


@pytest.mark.multiprocess
@pytest.mark.nightly
def test_bench_fusion_measures_memory_in_processes_of_its_own(scinet: Any) -> None:
    result = scinet("bench", "fusion", "--op", "pearson", *TINY)
    assert result.status == 0, result.err
    assert all(float(line[6]) >= 0 for line in _table(result.out)[2:])


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--sizes", "4x"), ["--sizes", "'4x'", "256", "1k"]),
        (("--sizes", "0"), ["--sizes", "'0'", "256"]),
        (("--sizes", "1k,,4k"), ["--sizes", "''"]),
        (("--sizes", "1000000000k"), ["--sizes", "GiB", "fewer rows"]),
        (("--json", "nowhere/rows.json"), ["--json", "nowhere", "does not exist"]),
    ],
)
def test_bench_fusion_refuses_in_one_sentence(scinet: Any, words: tuple[str, ...], names: list[str]) -> None:
    result = scinet("bench", "fusion", *words)
    assert result.status == 2
    assert result.out == ""
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    assert all(name in line for name in names), line


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("words", [("--tune",), ("--device", "cuda")])
def test_bench_fusion_says_when_a_gpu_is_needed(scinet: Any, words: tuple[str, ...]) -> None:
    result = scinet("bench", "fusion", *words)
    assert result.status == 2
    (line,) = result.err.splitlines()
    assert words[0] in line
    assert "GPU" in line


@pytest.mark.parametrize("overrides", [(), ("data.cache_features=false", "model.freeze_image=false")])
def test_bench_share_prints_the_shares(scinet: Any, scenes: Path, overrides: tuple[str, ...]) -> None:
    words = ("--config", ROOT / "configs/quickstart.yaml", f"data.path={scenes}", "model.image_size=64", *overrides)
    sizes = ("--batch", 64, "--bank", 256, "--images", 2, "--repeats", 1, "--threads", 1)
    result = scinet("bench", "share", *words, *sizes)
    assert result.status == 0, result.err
    header, _, *lines = _table(result.out)
    assert header == ["part", "seconds", "share"]
    assert [line[0].partition(":")[0] for line in lines] == [
        "fusion",
        "fusion",
        "image encoder",
        "text encoder",
        "**fusion in all**",
        *(["**fusion, features cached**"] if not overrides else []),
    ]
    shares = [float(line[2].rstrip("%")) for line in lines]
    assert sum(shares[:4]) == pytest.approx(100, abs=0.3)
    assert shares[4] == pytest.approx(shares[0] + shares[1], abs=0.2)
    assert "2 images a view and scaled linearly to 64 samples" in result.out
    assert shares[-1] >= shares[4]
    assert ("cached features spare" in result.out) == (not overrides)


@pytest.mark.parametrize("override", ["method=bce", "fusion.enabled=false", "model.image_size=sixty"])
def test_bench_share_refuses_what_has_no_fusion_to_time(scinet: Any, override: str) -> None:
    result = scinet("bench", "share", "--config", ROOT / "configs/quickstart.yaml", override)
    assert result.status == 2
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    assert override.partition("=")[0].rpartition(".")[2] in line


def test_bench_loader_prints_a_table_and_writes_the_same_rows_as_json(
    scinet: Any, scenes: Path, tmp_path: Path
) -> None:
    words = ("--data", scenes, "--images", 30, "--batch", 8, "--image-size", 32, "--repeats", 1)
    result = scinet("bench", "loader", *words, "--json", tmp_path / "rows.json")
    assert result.status == 0, result.err
    header, _, *lines = _table(result.out)
    assert header[0] == "contestant"
    whole = json.loads((tmp_path / "rows.json").read_text())
    assert [line[0] for line in lines] == [row["contestant"] for row in whole["rows"]]
    assert scinet("bench", "loader", "--data", tmp_path / "nowhere").status == 2


def test_bench_plan_prints_bytes_and_times_for_every_number_of_ranks(scinet: Any) -> None:
    words = ("--config", ROOT / "configs/quickstart.yaml", "model.image_size=32", "--classes", 7, "--micro-batch", 2)
    result = scinet("bench", "plan", *words, "--batches", "3", "--gpus", "1,2")
    assert result.status == 0, result.err
    header, _, row, again, _, _ = _table(result.out)
    assert header == ["G", "ranks", "micro-batches", "losses", "ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3"]
    # 3 samples do not divide over 2 ranks, nor into micro-batches of 2
    assert row == ["3", "1", "3", *["0 B"] * 5]
    assert again[:3] == ["G", "ranks", "computing"]
    refused = scinet("bench", "plan", *words, "--gpus", "eight")
    assert refused.status == 2
    assert "--gpus has 'eight'" in refused.err


@pytest.mark.nightly
def test_bench_plan_prints_the_lines_of_the_readme(scinet: Any) -> None:
    readme = (ROOT / "cluster/README.md").read_text()
    command = ("bench", "plan", "--config", "configs/coco2014.yaml", "--classes", "80")
    assert f"`scinet {' '.join(command)}`" in readme
    # the rows do not depend on each other: two of nine say enough
    result = scinet(*command[:3], ROOT / command[3], *command[4:], "--batches", "4k,64k", "--gpus", 512)
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    assert len(_table(result.out)) == 8
    assert [line for line in lines if line not in readme.splitlines()] == []


@pytest.mark.multiprocess
@pytest.mark.nightly
def test_bench_step_prints_ratios_and_what_a_real_run_waits_for(launch: Any, scenes: Path) -> None:
    words = ("--config", ROOT / "configs/quickstart.yaml", f"data.path={scenes}", "model.image_size=32")
    sizes = ("train.global_batch_size=4", "--repeats", 1, "--steps", 3, "--threads", 1, "--device", "cpu")
    done = launch(sys.executable, "-m", "scinet.cli", "bench", "step", *words, *sizes)
    assert done.returncode == 0, done.stderr[-3000:]
    _, _, *lines = _table(done.stdout)
    ours, bare, clip = lines[:3]
    assert [ours[1], bare[1], clip[1]] == ["40", "40", "36"]
    verdicts = [line for line in lines if len(line) == 5 and line[3].startswith("at most")]
    assert [line[0].partition(":")[0] for line in verdicts] == [
        "time of a step",
        "highest memory of a step",
        *["images", "images", "cached features", "cached features"],
    ]
    assert {line[4].partition(",")[0] for line in verdicts} <= {"yes", "no"}


def test_bench_step_refuses_a_method_without_such_a_step(scinet: Any) -> None:
    result = scinet("bench", "step", "--config", ROOT / "configs/quickstart.yaml", "method=bce")
    assert result.status == 2
    assert "method=bce has no step to compare" in result.err


@pytest.mark.multiprocess
@pytest.mark.nightly
def test_bench_ranks_prints_measured_and_planned_steps_of_every_stage(launch: Any, scenes: Path) -> None:
    words = ("--config", ROOT / "configs/quickstart.yaml", f"data.path={scenes}", "model.image_size=32")
    sizes = ("train.global_batch_size=4", "--repeats", 1, "--threads", 1)
    done = launch("torchrun", "--nproc-per-node", 2, "-m", "scinet.cli", "bench", "ranks", *words, *sizes)
    assert done.returncode == 0, done.stderr[-3000:]
    header, _, row = _table(done.stdout)
    assert header[3:] == [f"ZeRO {stage} (planned)" for stage in range(4)]
    assert row[0] == "2"
    assert row[2].endswith(" us")


def test_bench_scrape_prints_the_cost_of_a_scrape_for_each_number_of_ranks(
    launch: Any, on_features: tuple[str, ...]
) -> None:
    words = ("--config", ROOT / "configs/quickstart.yaml", *on_features, "train.global_batch_size=16")
    how = ("--ranks", "1,3", "--steps", 2, "--repeats", 2, "--threads", 1)
    done = launch(sys.executable, "-m", "scinet.cli", "bench", "scrape", *words, "telemetry.refresh_s=0.1", *how)
    assert done.returncode == 0, done.stderr[-3000:]
    header, _, *lines = _table(done.stdout)
    assert header[:2] == ["compared", "figure"]
    assert [re.sub(r" \(.*", "", line[0].partition(", ")[0]) for line in lines] == 2 * [
        "training time of a scrape",
        "processor time of serving one",
        "processor time of a refresh",
    ]
    assert all(float(line[1]) > 0 for line in lines if line[0].startswith("processor"))
    assert all(re.search(r"[1-9]\d* scrapes\)", line[0]) for line in lines if line[0].startswith("training"))


def test_bench_zoo_has_a_line_for_every_method(scinet: Any) -> None:
    result = scinet("bench", "zoo", "--samples", 8, "--classes", 20, "--batch", 4, "--steps", 1)
    assert result.status == 0, result.err
    assert result.err.split() == [method.value for method in METHODS]
    assert [line.split()[0] for line in result.out.splitlines()[2:]] == [method.value for method in METHODS]
