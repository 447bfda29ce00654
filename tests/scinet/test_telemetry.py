"""The log of a killed run is read as far as it was written."""

from __future__ import annotations

from pathlib import Path

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
