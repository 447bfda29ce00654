"""How much memory there is for this rank: the GPU's, the machine's, or what its control group allows."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_UNLIMITED = 2**60  # control groups of version 1 write a huge number where there is no limit


@dataclass(frozen=True)
class Room:
    """Bytes that one rank may still take: of its GPU (None without one) and of the host, which its ranks share."""

    device: int | None
    host: int
    host_name: str


def look(device: torch.device, local_ranks: int) -> Room:
    """Return what is free now.

    Args:
        device: of this rank.
        local_ranks: ranks on this host.
    """
    on_gpu = None
    if device.type == "cuda":
        # what torch holds without using it is free too
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        on_gpu = torch.cuda.mem_get_info(device)[0] + kept
    return Room(on_gpu, host_bytes() // local_ranks, socket.gethostname())


def ranks_on_this_host(world_size: int) -> int:
    """Return how many ranks the launcher started here: torchrun and DeepSpeed each have a variable of their own."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if os.environ.get(name, "").isdigit():
            return max(1, int(os.environ[name]))
    return world_size


def host_bytes(root: Path = Path("/")) -> int:
    """Return the host memory that a process can still get: what the kernel says, or what a control group leaves.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """
    return min(_available(root), *_left_by_groups(root))


def _available(root: Path) -> int:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_by_groups(root: Path) -> Iterator[int]:
    """Yield what each control group around this process leaves: any of them may have a limit."""
    yield _UNLIMITED
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                left = _left(folder, *names)
                if left is not None:
                    yield left


def _left(folder: Path, limit_name: str, used_name: str) -> int | None:
    try:
        limit, used = ((folder / name).read_text().strip() for name in (limit_name, used_name))
        statistics = (folder / "memory.stat").read_text().split()
    except OSError:
        return None
    if not limit.isdigit() or int(limit) >= _UNLIMITED:
        return None
    # files that were read lately count as used, and go when memory is wanted
    counted = dict(zip(statistics[::2], statistics[1::2], strict=False))
    idle = int(counted.get("total_inactive_file", counted.get("inactive_file", "0")))
    return max(0, int(limit) - int(used) + idle)
