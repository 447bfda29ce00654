"""Processes that train cells side by side, and what becomes of each; a lost process costs its own cell only."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from scinet.errors import ScinetError

if TYPE_CHECKING:  # a worker sets its threads and its GPU before torch is imported
    from scinet.evaluation.comparison.store import Store
    from scinet.evaluation.comparison.training import Trainings
    from scinet.options import Options

_BETWEEN_TRIES_S = 1.0
_STOPS = {signal.SIGINT, signal.SIGTERM}


@dataclass(frozen=True)
class Task:
    """A cell to train.

    Attributes:
        key: what it is kept by.
        options: of the training.
        described: what can change its result.
        test_peak: whether to test at every evaluated epoch.
    """

    key: str
    options: Options
    described: dict[str, Any]
    test_peak: bool


@dataclass(frozen=True)
class Reply:
    """What a process says.

    ``done`` and ``failed`` end a cell, ``busy`` says that another command trains it, ``progress`` tells of a slow part.
    """

    state: Literal["done", "failed", "busy", "progress"]
    text: str = ""
    done: int = 0
    total: int = 0
    is_last: bool = False  # of its process, which has died or may be spoilt


class Worker:
    """One process, and the pipe to it."""

    def __init__(self, folder: Path, gpu: str | None) -> None:
        """Start it.

        Args:
            folder: of the cells.
            gpu: the only one that it may see, as CUDA_VISIBLE_DEVICES names it.
        """
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.task: Task | None = None
        self._process = context.Process(target=_live, args=(serve, theirs, folder, gpu))
        # Ctrl-C and a scheduler reach all processes: the command alone answers them, and then ends its workers
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def give(self, task: Task) -> None:
        """Let it train a cell."""
        self.task = task
        with contextlib.suppress(OSError):  # where it has died, its end of the pipe tells
            self.pipe.send(task)

    def hear(self) -> Reply:
        """Return its next reply; that it has died is one too."""
        try:
            reply: Reply = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            return Reply("failed", _epitaph(self._process.exitcode or 0), is_last=True)
        return reply

    def end(self) -> None:
        """End it at once: what it has written is whole."""
        self.pipe.close()
        self._process.kill()
        self._process.join()


def carry_out(
    tasks: Sequence[Task], folder: Path, jobs: int, gpus: Sequence[str]
) -> Generator[tuple[Task | None, Reply]]:
    """Train cells and yield what becomes of them as it happens; no process is left once it is closed.

    Args:
        tasks: of different keys.
        folder: of the cells.
        jobs: processes at once.
        gpus: as CUDA_VISIBLE_DEVICES names them, dealt out in turn; empty where there is none.

    Yields:
        a cell and how it ended, or ``busy`` each time that another command still trains it; None with ``progress``.
    """
    todo, elsewhere = deque(tasks), deque[Task]()
    next_try_s = 0.0
    crew: dict[int, Worker] = {}
    try:
        while todo or elsewhere or any(worker.task for worker in crew.values()):
            if not todo and elsewhere and time.monotonic() >= next_try_s:
                todo, elsewhere = elsewhere, todo
                next_try_s = time.monotonic() + _BETWEEN_TRIES_S
            for place in range(jobs):
                if todo and (place not in crew or crew[place].task is None):
                    if place not in crew:
                        crew[place] = Worker(folder, gpus[place % len(gpus)] if gpus else None)
                    crew[place].give(todo.popleft())
            pipes = {worker.pipe: place for place, worker in crew.items() if worker.task}
            for pipe in wait(list(pipes), timeout=_BETWEEN_TRIES_S if elsewhere else None):
                place = pipes[cast(Any, pipe)]
                worker = crew[place]
                reply = worker.hear()
                if reply.state == "progress":
                    yield None, reply
                    continue
                task, worker.task = worker.task, None
                assert task is not None
                if reply.state == "busy":
                    elsewhere.append(task)
                if reply.is_last:
                    crew.pop(place).end()
                yield task, reply
    finally:
        for worker in crew.values():
            worker.end()


def _live(
    work: Callable[[Connection, Path, str | None], None], pipe: Connection, folder: Path, gpu: str | None
) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    work(pipe, folder, gpu)


def serve(pipe: Connection, folder: Path, gpu: str | None) -> None:
    """Train what comes through a pipe, one thread on the CPU, until it is closed."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    num_threads = int(told) if told.isdecimal() else len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    import torch

    from scinet.distributed import initialise
    from scinet.evaluation.comparison.store import Store
    from scinet.evaluation.comparison.training import Trainings
    from scinet.options import Options
    from scinet.telemetry import configure_logging

    torch.set_num_threads(1)
    configure_logging(is_first=False)
    store = Store(folder)
    ranks = initialise(Options().train.collective_timeout_s)
    trainings = Trainings(
        store, ranks, lambda what, done, total: pipe.send(Reply("progress", what, done, total)), num_threads
    )
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(_attempt(pipe.recv(), store, trainings))


def _attempt(task: Task, store: Store, trainings: Trainings) -> Reply:
    try:
        with store.claimed(task.key) as is_ours:
            if store.find(task.key, test_peak=task.test_peak):
                return Reply("done")
            if not is_ours:
                return Reply("busy")
            store.write(task.key, trainings.train(task.options, test_peak=task.test_peak), task.described)
    except ScinetError as error:
        return Reply("failed", str(error))
    except Exception as error:  # whatever it is, it must not cost the other cells
        traceback.print_exc()
        return Reply("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", is_last=True)
    return Reply("done")


def _leave_with_parent() -> None:
    """End this process when the command is killed: it would train for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _epitaph(status: int) -> str:
    if status == -signal.SIGKILL:
        return "its process was killed, as a machine does that runs out of memory: try fewer --jobs"
    how = f"by signal {-status}" if status < 0 else f"with exit status {status}"
    return f"its process ended {how} and left no word"
