"""A run directory as training leaves it, and an endpoint that says what a test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from scinet import config
from scinet.options import Options
from scinet.rundir import RunDirectory

Serve = Callable[[bytes], int]
FIGURES = """\
# HELP scinet_run_info Which run it is
# TYPE scinet_run_info gauge
scinet_run_info{method="scinet",profile="paper",run="one"} 1.0
# HELP scinet_world_size Ranks
# TYPE scinet_world_size gauge
scinet_world_size 2.0
# HELP scinet_train_steps_total Steps
# TYPE scinet_train_steps_total counter
scinet_train_steps_total 13.0
# HELP scinet_train_samples_total Samples
# TYPE scinet_train_samples_total counter
scinet_train_samples_total 1664.0
# HELP scinet_train_planned_steps Steps
# TYPE scinet_train_planned_steps gauge
scinet_train_planned_steps 50.0
# HELP scinet_rank_up Lives
# TYPE scinet_rank_up gauge
scinet_rank_up{host="alpha",rank="0"} 1.0
scinet_rank_up{host="beta",rank="1"} 0.0
# HELP scinet_process_resident_memory_bytes Memory
# TYPE scinet_process_resident_memory_bytes gauge
scinet_process_resident_memory_bytes{rank="0"} 3221225472.0
scinet_process_resident_memory_bytes{rank="1"} NaN
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of ten epochs of five steps, in its third epoch."""
    return begun(tmp_path / "runs", "one")


def begun(output: Path, name: str) -> RunDirectory:
    directory = RunDirectory(output / name)
    directory.checkpoints.mkdir(parents=True)
    directory.config.write_text(config.to_yaml(Options(output=str(output), name=name)))
    rows: list[dict[str, Any]] = []
    for step in range(1, 13):
        losses = {"loss/total": 3 / step, "loss/supervised": 2 / step, "loss/distillation": None}
        rows.append({"step": step, **losses, "samples_per_second": 40.0, "data_wait_share": 0.25})
        if step % 5 == 0:
            rows.append({"step": step, "epoch": step // 5 - 1, "holdout_map": 60.0 - step})
    directory.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture
def serve() -> Iterator[Serve]:
    """``serve(answer)``: answer every request with these bytes, as they are, on the port that is returned."""
    started: list[ThreadingHTTPServer] = []

    def begin(answer: bytes) -> int:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        started.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=started[-1].serve_forever, args=(0.02,), daemon=True).start()
        return int(started[-1].server_address[1])

    yield begin
    for each in started:
        each.shutdown()
        each.server_close()


def announce(run: RunDirectory, *targets: object) -> None:
    """Write where the run's endpoints are, as it does itself."""
    run.targets.parent.mkdir(exist_ok=True)
    run.targets.write_text(json.dumps([{"targets": list(targets), "labels": {"run": run.path.name}}]))


def ok(body: str | bytes) -> bytes:
    """Return a whole HTTP answer."""
    return b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n" + (body if isinstance(body, bytes) else body.encode())
