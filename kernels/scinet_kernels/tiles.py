"""Tile sizes of the Triton kernels: a frozen table by architecture, and a cache of what was tuned on this machine.

Nothing is tuned while a program runs: the first step would look hung and results would vary (kernels.md 5.3). To add an
architecture, add its rows here, make `kernels/compiled.json` anew (`python -m scinet_kernels.compiling`) and look at
its spills, shared memory and tensor-core instructions.
"""

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Tile:
    """Sizes of one program.

    Attributes:
        rows: query rows (Gaussian), or columns a of the correlation (Pearson).
        columns: keys a step, or columns b of the correlation.
        inner: what a matrix product contracts at once: embedding columns, or observations.
        values: value columns of one program; 0 where the kernel has none.
        num_warps: warps (wavefronts) of a program.
        num_stages: depth of the software pipeline.

    """

    rows: int
    columns: int
    inner: int
    values: int
    num_warps: int
    num_stages: int


# (kernel, architecture, width of the inputs in bits). Every row is in kernels/compiled.json.
TABLE: dict[tuple[str, str, int], Tile] = {
    ("gaussian_forward", "sm_80", 16): Tile(128, 64, 64, 128, num_warps=8, num_stages=3),
    ("gaussian_forward", "sm_80", 32): Tile(64, 32, 32, 128, num_warps=8, num_stages=2),
    ("gaussian_forward", "sm_90", 16): Tile(128, 64, 64, 128, num_warps=8, num_stages=3),
    ("gaussian_forward", "sm_90", 32): Tile(64, 64, 16, 128, num_warps=8, num_stages=2),
    ("gaussian_forward", "sm_100", 16): Tile(64, 64, 64, 128, num_warps=8, num_stages=3),
    ("gaussian_forward", "sm_100", 32): Tile(64, 64, 32, 128, num_warps=8, num_stages=2),
    ("gaussian_forward", "gfx942", 16): Tile(128, 64, 32, 128, num_warps=8, num_stages=2),
    ("gaussian_forward", "gfx942", 32): Tile(64, 64, 32, 128, num_warps=8, num_stages=2),
    # whole query rows stay in shared memory: 200 KiB, which only these have
    ("gaussian_forward_held", "sm_90", 16): Tile(128, 32, 512, 128, num_warps=8, num_stages=2),
    ("gaussian_forward_held", "sm_100", 16): Tile(128, 32, 512, 128, num_warps=8, num_stages=2),
    ("gaussian_panel", "sm_80", 16): Tile(128, 128, 64, 64, num_warps=8, num_stages=3),
    ("gaussian_panel", "sm_80", 32): Tile(64, 64, 16, 32, num_warps=8, num_stages=2),
    ("gaussian_panel", "sm_90", 16): Tile(128, 128, 64, 64, num_warps=8, num_stages=3),
    ("gaussian_panel", "sm_90", 32): Tile(64, 64, 32, 32, num_warps=8, num_stages=2),
    ("gaussian_panel", "sm_100", 16): Tile(128, 64, 64, 64, num_warps=8, num_stages=3),
    ("gaussian_panel", "sm_100", 32): Tile(64, 64, 32, 32, num_warps=8, num_stages=2),
    ("gaussian_panel", "gfx942", 16): Tile(128, 128, 64, 64, num_warps=8, num_stages=2),
    ("gaussian_panel", "gfx942", 32): Tile(64, 64, 32, 32, num_warps=8, num_stages=2),
}

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

# Pearson: half inputs are multiplied in split fp32 too, so that both widths take the same tile.
TABLE |= {
    ("pearson", name, bits): Tile(rows=64, columns=32, inner=16, values=0, num_warps=4, num_stages=3)
    for name in ARCHITECTURES
    for bits in (16, 32)
}


def architecture(device: torch.device) -> str:
    """Return the row of the table that a device uses: its own, or the nearest older one.

    Args:
        device: a GPU; the interpreter's CPU tensors take the smallest tiles.

    """
    if device.type != "cuda":
        return ARCHITECTURES[0]
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 12:  # newer than sm_100, with half its shared memory
        return ARCHITECTURES[0]
    older = [name for name in ARCHITECTURES if name.startswith("sm_") and int(name[3:]) <= 10 * major + minor]
    return older[-1] if older else ARCHITECTURES[0]


def tile(kernel: str, device: torch.device, dtype: torch.dtype) -> Tile:
    """Return the tile of a kernel on a device: what was tuned on this machine, else the table's.

    Args:
        kernel: its name in the table.
        device: where it runs.
        dtype: of the inputs.

    """
    key = (kernel, architecture(device), 8 * dtype.itemsize)
    return _tuned().get(key) or TABLE[key]


def forward_kernel(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Return the name of the Gaussian forward that fits: the one that holds whole query rows, where they are narrow.

    Args:
        device: where it runs.
        dtype: of the inputs.
        width: D.

    """
    held = TABLE.get(("gaussian_forward_held", architecture(device), 8 * dtype.itemsize))
    return "gaussian_forward_held" if held is not None and width <= held.inner else "gaussian_forward"


def cache_path() -> Path:
    """Return the file in which tuned tiles are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "scinet" / "tiles.json"


def remember(kernel: str, device: torch.device, dtype: torch.dtype, chosen: Tile) -> None:
    """Keep a tuned tile for later processes.

    Args:
        kernel: its name in the table.
        device: where it was tuned.
        dtype: of the inputs.
        chosen: the fastest.

    """
    tuned = _tuned() | {(kernel, architecture(device), 8 * dtype.itemsize): chosen}
    rows = [{"key": list(key), "tile": asdict(found)} for key, found in tuned.items()]
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    temporary.rename(path)
    _tuned.cache_clear()


@contextmanager
def trying(kernel: str, device: torch.device, dtype: torch.dtype, candidate: Tile) -> Iterator[None]:
    """Let :func:`tile` return a candidate meanwhile, in this process only.

    Args:
        kernel: its name in the table.
        device: where it runs.
        dtype: of the inputs.
        candidate: the tile on trial.

    """
    key = (kernel, architecture(device), 8 * dtype.itemsize)
    tuned = _tuned()
    before = tuned.get(key)
    tuned[key] = candidate
    try:
        yield
    finally:
        if before is None:
            del tuned[key]
        else:
            tuned[key] = before


@functools.lru_cache
def _tuned() -> dict[tuple[str, str, int], Tile]:
    path = cache_path()
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return {(str(row["key"][0]), str(row["key"][1]), int(row["key"][2])): Tile(**row["tile"]) for row in rows}


class Compilation(NamedTuple):
    """A kernel ready to be compiled ahead of time.

    Attributes:
        kernel: the decorated function.
        signature: type of each argument, "constexpr" for those in `constants`.
        constants: values of the compile-time arguments.
        aligned: arguments divisible by 16, as torch's allocations and usual widths are.
        tile: for the numbers of warps and stages.

    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: set[str]
    tile: Tile


def type_name(dtype: torch.dtype) -> str:
    """Return Triton's name of a floating-point dtype."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
