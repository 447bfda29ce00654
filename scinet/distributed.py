"""Ranks, devices and collectives; only this module and ``notes.py`` talk to ``torch.distributed``."""

from __future__ import annotations

import datetime
import importlib
import logging
import math
import os
import platform
import re
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from scinet.errors import PeerLost, ScinetError

T = TypeVar("T")
_LONGEST_TRY_S, _BETWEEN_TRIES_S = 5.0, 0.2


@dataclass(frozen=True)
class Ranks:
    """This process among all: rank in [0, world_size), and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that speaks and writes."""
        return self.rank == 0


def initialise(timeout_s: int) -> Ranks:
    """Join the process group that the launcher describes, or form one alone. Collective.

    Works under ``deepspeed``, ``torchrun`` and plain ``python``.

    Args:
        timeout_s: longest wait for another rank, at the start and in any collective.

    Raises:
        PeerLost: the others did not come.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    has_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    quieten_deepspeed()
    import deepspeed

    # imported before a group exists: imported later it keeps the group's threads alive, which can abort the exit
    importlib.import_module("torch._dynamo")

    if not has_gpu:
        _skip_shared_memory_op()
    backend = "nccl" if has_gpu else "gloo"
    if not dist.is_initialized() and world_size == 1:
        # alone there is nobody to meet: no port, no address; DeepSpeed asks for the variables all the same
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            os.environ.setdefault(name, value)
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    address, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    started = time.monotonic()
    try:
        if rank > 0 and address:
            _await_first_rank(address, port, timeout_s)
        timeout = datetime.timedelta(seconds=timeout_s)
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, auto_mpi_discovery=False)
    except (RuntimeError, OSError) as error:
        raise PeerLost(
            f"rank {rank} on {platform.node()} waited {time.monotonic() - started:.0f} s (limit {timeout_s} s) for the "
            f"{world_size} ranks that meet at {address}:{port}, and gave up ({reason_of(error)}): the same command "
            "with --resume auto tries again"
        ) from error
    return Ranks(rank, world_size, device)


def _await_first_rank(address: str, port: int, timeout_s: float) -> None:
    """Return when something listens where the ranks meet; torch's own wait for it ends in a page of its stack."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            # a packet may be lost, and a name may come to lead elsewhere
            socket.create_connection((address, port), timeout=_LONGEST_TRY_S).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_BETWEEN_TRIES_S)


def quieten_deepspeed() -> None:
    """Keep DeepSpeed from logging its settings on every rank, and its calls of deprecated names; its warnings stay."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def _skip_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling ``deepspeed_shm_comm`` on the CPU.

    It serves only ``inference_all_reduce``; its build takes minutes in every rank, and a build that is killed leaves a
    lock behind on which every later start waits without a word.
    """
    module: Any = sys.modules["deepspeed.comm.torch"]
    module.build_shm_op = lambda: None


def gather_rows(rows: Tensor, ranks: Ranks) -> Tensor:
    """Return the rows of all ranks in global sample order. Collective.

    Rank r holds the samples r, r + R, r + 2R, ... of the global batch, so the ranks' rows interleave.

    Args:
        rows: [B, ...], B equal on every rank.
        ranks: this process.

    Returns:
        [R * B, ...].
    """
    if ranks.world_size == 1:
        return rows
    rows = rows.contiguous()
    gathered = [torch.empty_like(rows) for _ in range(ranks.world_size)]
    dist.all_gather(gathered, rows)
    return torch.stack(gathered, dim=1).flatten(0, 1)


@dataclass
class Gathering:
    """Rows of several columns on their way to all ranks, in one message."""

    _columns: tuple[Tensor, ...]
    _received: Tensor | None
    _work: Any

    def rows(self) -> tuple[Tensor, ...]:
        """Wait, and return each column's rows of all ranks in global sample order: [R * B, ...]."""
        if self._received is None:
            return self._columns
        if self._work is not None:
            self._work.wait()
            self._work = None
        own = len(self._columns[0])
        rows = self._received.view(-1, own, self._received.shape[1]).transpose(0, 1).flatten(0, 1)
        widths = [_row_bytes(column) for column in self._columns]
        # a column without width has no bytes, which torch cannot view as another dtype
        return tuple(
            part.contiguous().view(column.dtype).view(len(rows), *column.shape[1:])
            if width
            else column.new_empty(len(rows), *column.shape[1:])
            for part, column, width in zip(torch.split(rows, widths, dim=1), self._columns, widths, strict=True)
        )


def start_gather(columns: Iterable[Tensor], ranks: Ranks) -> Gathering:
    """Begin to gather columns of rows as :func:`gather_rows` does, while this rank computes. Collective.

    Args:
        columns: [B, ...] each, of any dtype; B equal on every rank.
        ranks: this process.
    """
    columns = tuple(column.detach() for column in columns)
    if ranks.world_size == 1:
        return Gathering(columns, None, None)
    flat = [column.contiguous().view(len(column), math.prod(column.shape[1:])) for column in columns]
    packed = torch.cat([column.view(torch.uint8) for column in flat], 1)
    received = packed.new_empty(ranks.world_size * len(packed), packed.shape[1])
    work = dist.all_gather_single(received, packed, async_op=True)
    return Gathering(columns, received, work)


def _row_bytes(column: Tensor) -> int:
    return column[0].numel() * column.element_size()


def gather_objects(values: list[T], ranks: Ranks) -> list[T]:
    """Return the values of all ranks in global sample order, as :func:`gather_rows` does. Collective.

    Args:
        values: equally many on every rank; anything that can be pickled.
        ranks: this process.
    """
    if ranks.world_size == 1:
        return values
    gathered: list[list[T]] = [[] for _ in range(ranks.world_size)]
    dist.all_gather_object(gathered, values)
    return [value for together in zip(*gathered, strict=True) for value in together]


def sum_over_ranks(values: Tensor, ranks: Ranks) -> Tensor:
    """Return the element-wise sum over all ranks. Collective."""
    if ranks.world_size == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def wait_for_all(ranks: Ranks) -> None:
    """Return when every rank is here. Collective."""
    if ranks.world_size > 1:
        dist.barrier()


def share_first(tensors: Iterable[Tensor], ranks: Ranks) -> None:
    """Overwrite tensors with those of rank 0, where processors may have rounded differently. Collective."""
    if ranks.world_size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def first_rank_first(work: Callable[[], T], ranks: Ranks) -> T:
    """Run ``work`` on rank 0, then on the others; for files that one rank makes and all read. Collective.

    An error on rank 0 is raised on all ranks, so that none waits for a file that never comes.
    """
    failure: list[ScinetError | None] = [None]
    result: list[T] = []
    if ranks.is_first:
        try:
            result.append(work())
        except ScinetError as error:
            failure = [error]
    if ranks.world_size > 1:
        dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]
    return result[0] if result else work()


def from_first_rank(work: Callable[[], T], ranks: Ranks) -> T:
    """Run ``work`` on rank 0 only and give its result, or its error, to all. Collective."""
    outcome: list[Any] = [None, None]
    if ranks.is_first:
        try:
            outcome[0] = work()
        except ScinetError as error:
            outcome[1] = error
    if ranks.world_size > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return cast(T, outcome[0])


def is_lost_contact(error: RuntimeError) -> bool:
    """Return whether an error comes from a connection to another rank rather than from this one's work."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def reason_of(error: Exception) -> str:
    """Return what torch, gloo or the system says of a broken connection, without its source lines and greetings."""
    first = str(error).partition("\n")[0]
    return re.sub(r"^\[\S+\]\s*", "", first).partition(". ")[0].rstrip(".")


def shut_down() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
