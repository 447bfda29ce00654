"""What an operator costs, from its shape alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scinet_kernels.reference import DEFAULT_WORKSPACE_BYTES, pair_bytes

_SHAPES = {
    "gaussian_propagate": ("B", "M", "D", "C"),
    "gaussian_mass": ("B", "M", "D"),
    "gaussian_similarity": ("B", "M", "D"),
    "nearest_neighbours": ("B", "M", "D", "k"),
    "pearson": ("N", "C"),
}


@dataclass(frozen=True)
class Cost:
    """Work and memory of one forward pass.

    Attributes:
        flop: floating-point operations of the matrix products (one multiply-add = 2).
        bytes_read: size of the inputs.
        bytes_written: size of the outputs.
        workspace_bytes: temporary memory beside inputs and outputs, at the default `workspace_bytes`.

    """

    flop: int
    bytes_read: int
    bytes_written: int
    workspace_bytes: int


def estimate(op: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Cost:
    """Estimate one forward pass without running it.

    Args:
        op: name of a public function.
        shape: its sizes: gaussian_propagate (B, M, D, C), gaussian_mass and gaussian_similarity (B, M, D),
            nearest_neighbours (B, M, D, k), pearson (N, C).
        dtype: dtype of the floating-point inputs.
        device: where it would run. The reference costs the same on every device.

    Returns:
        The cost of the reference.

    Raises:
        ValueError: unknown operator, or sizes that do not fit it.

    """
    torch.device(device)  # refuses a name that is no device
    if op not in _SHAPES:
        raise ValueError(f"op={op!r} is unknown: choose one of {', '.join(_SHAPES)}.")
    names = _SHAPES[op]
    if len(shape) != len(names) or any(size < 0 for size in shape):
        raise ValueError(f"shape={tuple(shape)} does not fit {op}: give ({', '.join(names)}), none negative.")
    given = dtype.itemsize
    wide = torch.promote_types(dtype, torch.float32).itemsize
    if op == "pearson":
        rows, columns = shape
        cells, matrix = rows * columns, columns * columns
        # Three fp64 factors (weight, weighted value, weighted square) beside the values; four fp64 moments.
        return Cost(8 * rows * matrix, cells * given, 2 * matrix * wide, 4 * cells * 8 + 4 * matrix * 8)
    queries, keys, width = shape[:3]
    pairs = queries * keys
    copies = (queries + keys) * width * wide
    limit = pairs if op == "gaussian_similarity" else DEFAULT_WORKSPACE_BYTES // pair_bytes(_computed(dtype))
    workspace = copies + pair_bytes(_computed(dtype)) * min(pairs, max(limit, keys))
    flop, read = 2 * pairs * width, (queries + keys) * width * given
    if op == "gaussian_propagate":
        columns = shape[3]
        return Cost(flop + 2 * pairs * columns, read + keys * columns * given, queries * columns * wide, workspace)
    if op == "nearest_neighbours":
        return Cost(flop, read, math.prod((queries, shape[3], 8 + 4)), workspace)
    return Cost(flop, read, (queries if op == "gaussian_mass" else pairs) * wide, workspace)


def _computed(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
