"""The benchmark's bookkeeping; what it measures is no matter of a test."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scinet_kernels import bench, tiles, tuning
from scinet_kernels.bench import Row, Setting

PROPAGATE = Setting("propagate", rows=64, width=8, columns=3, repeats=2, has_backward=False, device="cpu")
PEARSON = Setting("pearson", rows=64, width=0, columns=3, repeats=2, has_backward=False, device="cpu")


@pytest.mark.parametrize("setting", [PROPAGATE, dataclasses.replace(PROPAGATE, has_backward=True), PEARSON])
def test_every_contestant_is_right_and_the_unit_is_one(setting: Setting) -> None:
    rows = bench.measure(setting, with_compiled=False, with_memory=False)
    assert rows[0].contestant == "GEMM"
    assert rows[0].ratio == 1
    assert rows[0].error is None
    exact = {row.contestant: row.error for row in rows if row.error is not None}
    assert any(name.startswith("ours") for name in exact)
    assert len(exact) >= 3
    assert max(exact.values()) < 1e-3
    for row in rows:
        assert row.seconds is not None
        assert row.seconds > 0
        assert row.grown_mib is row.peak_share is None
        assert row.note in ("", "unstable")


def test_an_error_is_seen_when_a_contestant_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BANDWIDTH", 0.1)  # the contestants keep theirs
    rows = bench.measure(PROPAGATE, with_compiled=False, with_memory=False)
    assert all(row.error > 1e-2 for row in rows if row.error is not None)


def test_contestants_are_skipped_when_their_matrices_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "available_bytes", lambda device: 4 * 64**2 * 7)  # half of it: three and a half matrices
    rows = {row.contestant: row for row in bench.measure(PROPAGATE, with_compiled=False, with_memory=False)}
    assert rows["cdist + exp"].note == "skipped: holds 0 GiB"
    assert rows["cdist + exp"].ratio is rows["cdist + exp"].seconds is rows["cdist + exp"].error is None
    assert rows["softmax(addmm) @ c"].ratio is not None
    assert rows["ours (cpu)"].ratio is not None


def test_a_row_says_so_when_its_memory_could_not_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_memory", lambda name, setting: None if name == "cdist + exp" else 1.0)
    rows = {row.contestant: row for row in bench.measure(PROPAGATE, with_compiled=False, with_memory=True)}
    assert "no memory figure: killed" in rows["cdist + exp"].note
    assert rows["ours (cpu)"].grown_mib == 1
    assert "killed" not in rows["ours (cpu)"].note


def test_memory_of_a_stored_matrix_is_seen_from_outside() -> None:
    setting = dataclasses.replace(PROPAGATE, rows=2048, repeats=1)
    ours, stored = (bench._memory(name, setting) for name in ("ours (cpu)", "cdist + exp"))
    assert ours is not None
    assert stored is not None
    assert 0 <= ours < stored
    # two matrices at the peak, but for pages that the process had before
    assert stored >= 0.98 * 2 * 2048**2 * 4 / 2**20


def test_table_and_json_say_the_same_when_printed() -> None:
    rows = [
        Row("propagate", 64, True, "GEMM", "unstable", 1.0, 0.25, 3.0),
        Row("propagate", 64, True, "ours (cpu)", "", 1.5, 0.375, 2.0, 1e-6),
        Row("propagate", 64, True, "cdist + exp", "skipped: holds 9 GiB"),
    ]
    head, _, *lines = bench.report(rows).splitlines()
    assert len(lines) == len(rows)
    assert "of bf16 peak" not in head
    assert lines[1] == "| propagate | 64 | forward + backward | ours (cpu) | 1.50 | 0.3750 | 2 | 1.0e-06 |  |"
    assert lines[2].endswith("| cdist + exp |  |  |  |  | skipped: holds 9 GiB |")
    whole = json.loads(bench.to_json(rows))
    assert [Row(**row) for row in whole["rows"]] == rows
    assert whole["environment"]["torch"] == torch.__version__
    on_gpu = bench.report([dataclasses.replace(rows[1], peak_share=0.5)])
    assert "| of bf16 peak |" in on_gpu
    assert "| 50.0% |" in on_gpu


def test_run_says_what_it_measures() -> None:
    said: list[str] = []
    rows = bench.run([PROPAGATE, PEARSON], with_compiled=False, with_memory=False, say=said.append)
    assert said == ["propagate, 64 rows, forward", "pearson, 64 rows, forward"]
    assert {row.operator for row in rows} == {"propagate", "pearson"}


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No tuned tiles of this machine, and none left behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiles._tuned.cache_clear()
    yield
    tiles._tuned.cache_clear()


@pytest.mark.usefixtures("own_cache")
def test_a_tile_on_trial_is_forgotten_afterwards() -> None:
    device, key = torch.device("cpu"), ("pearson", "sm_80", 32)
    candidate = dataclasses.replace(tiles.TABLE[key], rows=16)
    with tiles.trying("pearson", device, torch.float32, candidate):
        assert tiles.tile("pearson", device, torch.float32) == candidate
    assert tiles.tile("pearson", device, torch.float32) == tiles.TABLE[key]
    tiles.remember("pearson", device, torch.float32, candidate)
    with tiles.trying("pearson", device, torch.float32, tiles.TABLE[key]):
        assert tiles.tile("pearson", device, torch.float32) == tiles.TABLE[key]
    assert tiles.tile("pearson", device, torch.float32) == candidate


@pytest.mark.usefixtures("own_cache")
def test_the_fastest_tile_is_kept_when_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")  # stands for a GPU: the times below are made up

    def seconds(trial: tuning.Trial) -> float | None:
        if trial.tile.num_stages == 2:
            return None  # does not fit
        assert tiles.tile(trial.kernel, device, trial.dtype) == trial.tile
        return float(trial.tile.rows + trial.tile.num_warps)

    monkeypatch.setattr(tuning, "_seconds", lambda trial, size: seconds(trial))
    said: list[str] = []
    tuning.tune(64, 8, 3, device, said.append)
    for kernel in ("gaussian_forward", "gaussian_panel", "pearson"):
        found = tiles.tile(kernel, device, torch.float32)
        assert found.num_stages != 2
        assert (found.rows, found.num_warps) == (64, 4)
    assert len(said) == 12
    assert "gaussian_forward, bf16" in said[0]
    assert tiles.cache_path().is_file()
