"""What stands in for a worker: a key says what becomes of it. Imports little, so that a process starts at once."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

from scinet.evaluation.comparison import workers
from scinet.evaluation.comparison.workers import Reply


def serve(pipe: Connection, folder: Path, gpu: str | None) -> None:
    """Leave a file named by this process and its GPU, and do as the keys say."""
    (folder / f"{os.getpid()}.{gpu}").touch()
    while True:
        key = pipe.recv().key
        if key.startswith("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if key.startswith("sleep"):
            time.sleep(300)
        if key.startswith("busy") and not (folder / key).exists():
            (folder / key).touch()
            pipe.send(Reply("busy"))
            continue
        if key.startswith("slow"):
            pipe.send(Reply("progress", "features", 1, 2))
        pipe.send(Reply("failed", "it broke") if key.startswith("fail") else Reply("done"))


def main(folder: Path) -> None:
    """Be a command whose two workers sleep."""
    workers.serve = serve
    from tests.scinet.evaluation.comparison.test_workers import make_tasks

    for _ in workers.carry_out(make_tasks("sleep-1", "sleep-2"), folder, 2, []):
        pass
