"""What an operator costs, from its shape alone: a model, not a measurement; it needs neither a GPU nor Triton."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scinet_kernels import dispatch
from scinet_kernels.moments import BLOCK_ROWS, GPU_BLOCK_CELLS
from scinet_kernels.reference import DEFAULT_WORKSPACE_BYTES, pair_bytes

_SHAPES = {
    "gaussian_propagate": ("B", "M", "D", "C"),
    "gaussian_mass": ("B", "M", "D"),
    "gaussian_similarity": ("B", "M", "D"),
    "nearest_neighbours": ("B", "M", "D", "k"),
    "pearson": ("N", "C"),
}
_WITH_KERNEL = ("gaussian_propagate", "gaussian_mass", "pearson")
# An H100 (kernels.md section 3): dense matrix products, and memory as measured on such cards.
_HALF_FLOP_PER_S = 800e12
_SPLIT_FP32_FLOP_PER_S = 400e12 / 3  # three tf32 products make one
_BYTES_PER_S = 3.0e12


@dataclass(frozen=True)
class Cost:
    """Work and memory of one forward pass.

    Attributes:
        backend: what "auto" takes: "triton", "cpu" (blocked PyTorch, also on a GPU) or "reference".
        flop: floating-point operations of the matrix products (one multiply-add = 2), all pairs counted: that S is
            symmetric where the queries are the keys, which saves up to half, does not show in the shape.
        bytes_read: size of the inputs.
        bytes_written: size of the outputs.
        workspace_bytes: at most so much temporary memory at the default `workspace_bytes`, beside inputs, outputs and
            what is as large as they (row sums, the values with a column of ones).
        lower_bound_ms: on "cuda" what an H100 needs at least, the longer of products at their peak and of reading
            inputs and writing outputs once; None on other devices and for float64. No run was ever as fast.

    """

    backend: str
    flop: int
    bytes_read: int
    bytes_written: int
    workspace_bytes: int
    lower_bound_ms: float | None


def estimate(op: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Cost:
    """Estimate one forward pass of the path that "auto" takes, without running it.

    Args:
        op: name of a public function.
        shape: its sizes: gaussian_propagate (B, M, D, C), gaussian_mass and gaussian_similarity (B, M, D),
            nearest_neighbours (B, M, D, k), pearson (N, C).
        dtype: dtype of the floating-point inputs.
        device: where it would run; "cuda" stands for an H100 with Triton, present or not.

    Raises:
        ValueError: unknown operator, or sizes that do not fit it.

    """
    device = torch.device(device)
    if op not in _SHAPES:
        raise ValueError(f"op={op!r} is unknown: choose one of {', '.join(_SHAPES)}.")
    names = _SHAPES[op]
    if len(shape) != len(names) or any(size < 0 for size in shape):
        raise ValueError(f"shape={tuple(shape)} does not fit {op}: give ({', '.join(names)}), none negative.")
    computed = torch.promote_types(dtype, torch.float32)
    backend = dispatch.automatic(computed, device, rows=shape[0], fits_triton=op in _WITH_KERNEL)
    if op == "gaussian_similarity":
        backend = "reference"
    flop, read, written = _work(op, shape, dtype.itemsize, computed.itemsize)
    if op == "pearson":
        workspace = _pearson_workspace(shape, backend, computed, device)
    else:
        workspace = _gaussian_workspace(op, shape, backend, dtype)
    bound = None
    if device.type == "cuda" and dtype != torch.float64:
        # half inputs stay half in the Gaussian kernels alone
        is_half = dtype.itemsize == 2 and backend == "triton" and op != "pearson"
        peak = _HALF_FLOP_PER_S if is_half else _SPLIT_FP32_FLOP_PER_S
        bound = 1e3 * max(flop / peak, (read + written) / _BYTES_PER_S)
    return Cost(backend, flop, read, written, workspace, bound)


def _work(op: str, shape: Sequence[int], given: int, wide: int) -> tuple[int, int, int]:
    """Return operations, bytes read and bytes written; `given` and `wide` are bytes of a number."""
    if op == "pearson":
        rows, columns = shape
        return 8 * rows * columns**2, rows * columns * given, 2 * columns**2 * wide
    queries, keys, width = shape[:3]
    flop, read = 2 * queries * keys * width, (queries + keys) * width * given
    if op == "gaussian_propagate":
        columns = shape[3]
        return flop + 2 * queries * keys * columns, read + keys * columns * given, queries * columns * wide
    if op == "nearest_neighbours":
        return flop, read, math.prod((queries, shape[3], 8 + 4))
    return flop, read, (queries if op == "gaussian_mass" else queries * keys) * wide


def _gaussian_workspace(op: str, shape: Sequence[int], backend: str, dtype: torch.dtype) -> int:
    queries, keys, width = shape[:3]
    computed = torch.promote_types(dtype, torch.float32)
    if backend == "cpu":  # tiles and packed operands, however small the problem
        return min(DEFAULT_WORKSPACE_BYTES, (queries * keys + (queries + keys) * (width + 2)) * computed.itemsize)
    copies = (queries + keys) * width * computed.itemsize
    if backend == "triton":  # fp32 rows are centred, half ones taken as they are; two fp32 numbers a row
        return copies * (dtype == torch.float32) + (queries + keys) * 2 * 4
    pairs = queries * keys
    limit = pairs if op == "gaussian_similarity" else DEFAULT_WORKSPACE_BYTES // pair_bytes(computed)
    return copies + pair_bytes(computed) * min(pairs, max(limit, keys))


def _pearson_workspace(shape: Sequence[int], backend: str, computed: torch.dtype, device: torch.device) -> int:
    rows, columns = shape
    matrix = columns**2
    if backend == "reference":  # three float64 factors beside the values; four float64 moments
        return 4 * rows * columns * 8 + 4 * matrix * 8
    largest = BLOCK_ROWS if device.type == "cpu" else max(BLOCK_ROWS, GPU_BLOCK_CELLS // max(1, columns))
    panel = 4 * min(rows, largest) * columns * computed.itemsize  # three columns and a mask
    partial = 0
    if device.type == "cpu":  # each thread has its panel and its products
        threads = min(torch.get_num_threads(), -(-rows // largest))
        panel, partial = panel * threads, 4 * matrix * computed.itemsize * (threads - 1)
    if backend == "triton":
        partial = max(DEFAULT_WORKSPACE_BYTES, 16 * matrix)
    return panel + partial + 4 * matrix * computed.itemsize + 8 * matrix * 8
