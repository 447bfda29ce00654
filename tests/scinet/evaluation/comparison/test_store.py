"""A finished cell comes back as it was written, and counts only when it is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scinet.errors import DataError
from scinet.evaluation.comparison import training
from scinet.evaluation.comparison.store import Store
from tests.scinet.evaluation.comparison.fakes import make_finished, make_test_set

KEY, OTHER = "00112233445566ff", "00112233445566ee"
TRUTH = make_test_set()

HOLD = """
import sys, time
from pathlib import Path
from scinet.evaluation.comparison.store import Store
with Store(Path(sys.argv[1])).claimed(sys.argv[2]) as is_ours:
    print(is_ours, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(training, "RESAMPLES", 20)
    found = Store(tmp_path / "cells")
    found.folder.mkdir()
    found.write(KEY, make_finished(TRUTH, 0.3), {"seed": 0})
    return found


def test_cell_comes_back_as_it_was_written(store: Store) -> None:
    finished = make_finished(TRUTH, 0.3)
    record = store.find(KEY, test_peak=False)
    assert record is not None
    assert record.course == finished.record.course
    for moment, judged in finished.record.judgements.items():
        assert record.judgements[moment].mean_average_precision == judged.mean_average_precision
        assert record.judgements[moment].per_class == judged.per_class
        assert torch.equal(record.judgements[moment].resampled, judged.resampled)
        kept = store.predictions(KEY, moment)
        assert kept.dtype == torch.float32
        assert torch.equal(kept, finished.predictions[moment])
    kept_set = store.test_set(record.truth)
    assert torch.equal(kept_set.truth, TRUTH.truth)
    assert (kept_set.class_names, kept_set.data_set) == (TRUTH.class_names, TRUTH.data_set)


def test_truth_is_kept_once_when_cells_share_the_test_set(store: Store) -> None:
    store.write(OTHER, make_finished(TRUTH, 0.4), {})
    assert len(list(store.folder.glob("truth-*.safetensors"))) == 1
    assert not list(store.folder.rglob("*.part"))


def test_cell_counts_as_not_run_when_it_is_not_whole(store: Store) -> None:
    assert store.find(OTHER, test_peak=False) is None
    figures, predictions = (store.folder / f"{KEY}{suffix}" for suffix in (".json", ".safetensors"))
    whole, bytes_ = figures.read_text(), predictions.read_bytes()
    for text in ("", "{}", whole[: len(whole) // 2], json.dumps({"test_map": 50.0, "last_map": 49.0})):
        figures.write_text(text)  # the last is a cell of the time before predictions were kept
        assert store.find(KEY, test_peak=False) is None
    figures.write_text(whole)
    predictions.write_bytes(bytes_[:-5])
    assert store.find(KEY, test_peak=False) is None
    predictions.unlink()
    assert store.find(KEY, test_peak=False) is None
    predictions.write_bytes(bytes_)
    assert store.find(KEY, test_peak=False) is not None
    next(store.folder.glob("truth-*")).unlink()
    assert store.find(KEY, test_peak=False) is None


def test_cell_counts_as_not_run_when_it_lacks_the_peak_that_is_asked_for(store: Store) -> None:
    assert store.find(KEY, test_peak=True) is None
    store.write(KEY, make_finished(TRUTH, 0.3, peak=70.0), {})
    assert store.find(KEY, test_peak=True) is not None


def test_damage_is_named_when_predictions_or_truth_are_read(store: Store) -> None:
    (store.folder / f"{KEY}.safetensors").write_bytes(b"junk")
    with pytest.raises(DataError, match=f"{KEY}.safetensors is damaged"):
        store.predictions(KEY, "selected")
    path = next(store.folder.glob("truth-*"))
    other = make_test_set(seed=1)
    store.write(OTHER, make_finished(other, 0.3), {})
    path.write_bytes((store.folder / f"truth-{other.name}.safetensors").read_bytes())
    with pytest.raises(DataError, match="not what its name says"):
        store.test_set(TRUTH.name)


@pytest.mark.multiprocess
def test_cell_is_claimed_by_one_process_until_that_ends(store: Store) -> None:
    def hold(key: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(store.folder), key]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with hold(KEY) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "True\n"
        with store.claimed(KEY) as is_ours:
            assert not is_ours
        with store.claimed(OTHER) as is_ours:
            assert is_ours
        first.kill()
        first.wait()
        with store.claimed(KEY) as is_ours:
            assert is_ours


# whether another process, which takes milliseconds to start, could lock the byte of a cell
TRY = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    for key in sys.argv[2:]:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(key[:15], 16))
            print("free")
        except OSError:
            print("taken")
"""


def test_claim_is_one_cells_and_ends_with_its_use(store: Store) -> None:
    other = "0f112233445566ff"

    def look() -> list[str]:
        command = [sys.executable, "-S", "-c", TRY, str(store.folder / ".cells.lock"), KEY, other]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    with store.claimed(KEY) as is_ours:
        assert is_ours
        assert look() == ["taken", "free"]
    assert look() == ["free", "free"]
