"""`scinet bench fusion --tune`: try a few tiles of each Triton kernel on this GPU, and keep the fastest in a cache."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from scinet_kernels import contestants, gaussian_propagate, pearson, tiles
from scinet_kernels.contestants import BANDWIDTH, Inputs
from scinet_kernels.tiles import Tile

_TURNS = 5


@dataclass(frozen=True)
class Trial:
    """A tile of a kernel for inputs of a dtype."""

    kernel: str
    dtype: torch.dtype
    tile: Tile


def tune(rows: int, width: int, columns: int, device: torch.device, say: Callable[[str], None]) -> None:
    """Time the candidates of every kernel, bf16 and fp32, and remember the fastest for later processes.

    Args:
        rows: N.
        width: D.
        columns: C.
        device: the GPU.
        say: told what is tried and what was chosen.

    """
    for dtype in (torch.bfloat16, torch.float32):
        inputs = contestants.make_inputs(rows, width, columns, device, dtype)
        for kernel in (tiles.forward_kernel(device, dtype, width), "gaussian_panel", "pearson"):
            times = {}
            tried = candidates(kernel, dtype)
            say(f"{kernel}, {tiles.type_name(dtype)}: compiling and timing {len(tried)} tiles")
            for candidate in tried:
                with tiles.trying(kernel, device, dtype, candidate):
                    seconds = _seconds(Trial(kernel, dtype, candidate), inputs)
                if seconds is not None:
                    times[candidate] = seconds
            fastest = min(times, key=times.__getitem__)
            tiles.remember(kernel, device, dtype, fastest)
            say(f"{fastest} at {times[fastest] * 1e3:.2f} ms")


def candidates(kernel: str, dtype: torch.dtype) -> list[Tile]:
    """Return a dozen at most: the table's tiles of all architectures, also with other numbers of warps and stages.

    Args:
        kernel: its name in the table.
        dtype: of the inputs.

    """
    bits = 8 * dtype.itemsize
    known = [tile for (name, _, width), tile in tiles.TABLE.items() if (name, width) == (kernel, bits)]
    varied = [dataclasses.replace(tile, num_warps=w, num_stages=s) for tile in known for w in (4, 8) for s in (2, 3)]
    return list(dict.fromkeys([*known, *varied]))


def _seconds(trial: Trial, inputs: Inputs) -> float | None:
    """Return the least time of the operator that runs the kernel, or None where the tile does not fit this GPU."""
    from triton.runtime.errors import OutOfResources

    try:
        _call(trial.kernel, inputs)
    except OutOfResources:
        return None
    times = []
    for _ in range(_TURNS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        _call(trial.kernel, inputs)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def _call(kernel: str, inputs: Inputs) -> None:
    if kernel == "pearson":
        pearson(inputs.values, inputs.known, backend="triton")
        return
    has_backward = kernel == "gaussian_panel"
    points = inputs.points.detach().requires_grad_(has_backward)
    with torch.set_grad_enabled(has_backward):
        result = gaussian_propagate(points, inputs.values, bandwidth=BANDWIDTH, backend="triton")
        if has_backward:
            torch.autograd.backward(result, inputs.signal.to(result.dtype))
