"""The log of a killed run is read as far as it was written."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scinet.telemetry import MetricsLog, read_metrics


def test_last_row_is_left_out_when_the_run_was_killed_while_writing_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    log = MetricsLog(path)
    log.rewind(2)
    log.write({"step": 3})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_rows_after_the_checkpoint_are_dropped_when_a_run_is_resumed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.write({"step": step})
    log.rewind(2)
    assert log.rows == read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """``full_disk(size)``: no file can be written beyond a size in bytes; -1 ends that."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


def test_rows_wait_whole_while_the_disk_is_full(
    tmp_path: Path, full_disk: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write({"step": 1})
    full_disk(path.stat().st_size + 3)
    log.write({"step": 2})
    log.write({"step": 3})
    assert path.read_text() == '{"step": 1}\n'
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        log.catch_up()
    full_disk(-1)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} cannot be written (No space left on device): its rows wait in memory"
    ]
    log.write({"step": 4})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]


def test_figures_that_are_not_finite_are_null_in_the_file(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    bad = {name: float(name) for name in ("nan", "inf", "-inf")}
    log.write({"step": 1, "loss": 0.5, "none": None, **bad})
    expected = {"step": 1, "loss": 0.5, "none": None, "nan": None, "inf": None, "-inf": None}
    assert read_metrics(tmp_path / "metrics.jsonl") == log.rows == [expected]
