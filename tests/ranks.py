"""Ranks for tests: processes forked from one that has imported torch, DeepSpeed and SCINet, once a session.

``run(function, ..., size=2)`` calls ``function(ranks, ...)`` in each rank of a group of its own and returns what each
returned; ``start`` leaves forming a group, ending and speaking to the function, for tests in which ranks fail.
"""

from __future__ import annotations

import faulthandler
import io
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from scinet_cluster.addresses import free_port

_IMPORTED = ("torch", "deepspeed", "scinet.running", "scinet.deferred_imports", "tests.ranks")
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(_IMPORTED))


@dataclass(frozen=True)
class Rank:
    """A process that runs a function."""

    process: BaseProcess
    log: Path
    _answer: Connection

    def end(self, timeout_s: float) -> tuple[int, list[str]]:
        """Return the exit status, as a shell has it, and the lines on standard error."""
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, f"still running after {timeout_s} s: {self.log.read_text()[-3000:]}"
        status = self.process.exitcode
        return status if status >= 0 else 128 - status, self.log.read_text().splitlines()

    def result(self, deadline: float) -> Any:
        """Return what the function returned, or fail with its traceback."""
        try:
            has_answered = self._answer.poll(max(0.0, deadline - time.monotonic()))
            answer = self._answer.recv_bytes() if has_answered else None
        except EOFError:
            answer = None
        if answer is None:
            self.process.join(5)
            status = self.process.exitcode
            raise AssertionError(f"a rank gave no answer (exit status {status}): {self.log.read_text()[-3000:]}")
        is_sound, value = torch.load(io.BytesIO(answer), weights_only=False)  # our own process's
        assert is_sound, f"{value}\n{self.log.read_text()[-2000:]}"
        return value

    def kill(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.join()
        self.log.unlink(missing_ok=True)


def _main(function: Callable[..., Any], arguments: Any, environment: Mapping[str, str], log: str, answer: Any) -> None:
    """Run a function in a forked process, with an environment and a standard error of its own."""
    os.environ.update(environment)
    os.chdir(environment["PWD"])
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    os.dup2(descriptor, 1)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115  # lives as long as the process
    faulthandler.enable(2)
    if answer is None:
        sys.exit(function(*arguments))
    try:
        outcome = (True, function(*arguments))
    except BaseException:
        outcome = (False, traceback.format_exc())
    content = io.BytesIO()
    torch.save(outcome, content)
    answer.send_bytes(content.getvalue())


def _in_group(before: Callable[[], None], function: Callable[..., Any], *arguments: Any) -> Any:
    from scinet import deferred_imports
    from scinet.distributed import initialise, shut_down

    before()
    deferred_imports.defer()
    ranks = initialise(120)
    try:
        return function(ranks, *arguments)
    finally:
        shut_down()


def start(
    function: Callable[..., Any], *arguments: Any, size: int, ranks: range | None = None, answers: bool = False
) -> list[Rank]:
    """Start a function in some ranks of a group that is ``size`` wide; what it returns is the exit status.

    Args:
        function: of a module that can be imported.
        arguments: of the function.
        size: world size.
        ranks: those to start, all unless given.
        answers: send back what the function returns instead.
    """
    shared = {name: os.environ[name] for name in ("XDG_CACHE_HOME", "HOME") if name in os.environ}
    shared |= {"PWD": os.getcwd(), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in ranks or range(size):
        log = Path(tempfile.mkstemp(prefix="rank-", suffix=".log")[1])
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank - (ranks or range(size)).start)}
        receiver, sender = _context.Pipe(duplex=False)
        words = (function, arguments, environment, str(log), sender if answers else None)
        process = _context.Process(target=_main, args=words)
        process.start()
        sender.close()
        started.append(Rank(process, log, receiver))
    return started


def _nothing() -> None:
    pass


def run(
    function: Callable[..., Any],
    *arguments: Any,
    size: int = 1,
    timeout_s: float = 240,
    before: Callable[[], None] = _nothing,
) -> list[Any]:
    """Return what ``function(ranks, *arguments)`` returned in each rank of a group.

    Args:
        function: of a module that can be imported; what it returns can be pickled.
        arguments: further ones.
        size: world size.
        timeout_s: longest wait for all ranks together.
        before: is called in each rank before it joins the group.
    """
    started = start(_in_group, before, function, *arguments, size=size, answers=True)
    deadline = time.monotonic() + timeout_s
    try:
        return [rank.result(deadline) for rank in started]
    finally:
        for rank in started:
            rank.kill()
