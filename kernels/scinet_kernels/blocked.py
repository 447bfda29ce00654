"""Gaussian propagation tile by tile in PyTorch, forward; runs on every device, never stores B x M.

Shapes: B queries, M keys, D embedding, C classes (columns of the values); a tile is [b, m].

A tile costs one library product for the exponents, one `exp` in place, one product with the values `v = w [c, 1]`,
whose last column sums the weights. Where S is symmetric each tile serves both of its triangles. On a CPU the tiles run
in C. Formulas: kernels.md section 2; tiles: `compiled_tiles.py`, `tiling.py`; gradients: `blocked_backward.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from scinet_kernels import compiled_tiles
from scinet_kernels.tiling import Problem, Walk
from scinet_kernels.underflow import recompute, underflown


class Values(NamedTuple):
    """Values as the products want them: columns = w [c - mean, 1] of shape [M, C + 1], the largest w scaled to 1."""

    columns: Tensor
    mean: Tensor
    weights: Tensor | None
    largest_weight: Tensor


def weighted_values(problem: Problem) -> Values:
    """Weight the values, and centre them, which changes no result and saves the backward from cancellation.

    Args:
        problem: the operands.

    """
    num_keys = len(problem.keys)
    values = problem.queries.new_zeros(num_keys, 0) if problem.values is None else problem.values
    dtype = torch.promote_types(values.dtype, problem.dtype)
    columns = torch.ones(num_keys, values.shape[1] + 1, dtype=dtype, device=values.device)
    mean = (values.sum(0, dtype=dtype) / max(1, num_keys)).nan_to_num(0, 0, 0)
    torch.sub(values, mean, out=columns[:, :-1])
    weights, largest = problem.pairs.key_weights, torch.ones((), dtype=dtype, device=values.device)
    if weights is not None and num_keys:
        weights = torch.where(weights > 0, weights, 0).to(dtype)
        largest = torch.where(weights.amax() > 0, weights.amax(), 1)
        weights = weights / largest
        columns *= weights[:, None]
    return Values(columns, mean, weights, largest)


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Propagate, and sum the weights.

    Args:
        problem: the operands.

    Returns:
        (result [B, C], log mass [B], mass [B] as the tiles summed it, for the backward).

    """
    values = weighted_values(problem)
    sums = values.columns.new_zeros(len(problem.queries), values.columns.shape[1])
    if compiled_tiles.runs(problem, values.columns):
        compiled_tiles.propagate(problem, values.columns, values.weights, sums)
    else:
        _propagate(problem, values.columns, sums)
    mass = sums[:, -1].clone()
    result = (sums[:, :-1] / mass[:, None]).add_(values.mean)
    log_mass = (mass * values.largest_weight).log().to(problem.dtype)
    rows = underflown(mass)
    if len(rows):
        whole = problem.queries.new_zeros(len(problem.keys), 0) if problem.values is None else problem.values
        for some, part, log_part in recompute(problem, rows, whole.to(result.dtype)):
            result[some], log_mass[some] = part, log_part
    return result, log_mass, mass


def _propagate(problem: Problem, values: Tensor, sums: Tensor) -> None:
    for tile, _, _, exponents in Walk(problem, num_tiles=1):
        weights = exponents.exp_().to(sums.dtype)
        sums[tile.rows].addmm_(weights, values[tile.columns])
        if tile.mirror < tile.column_end:
            sums[tile.mirrored].addmm_(weights[:, tile.mirror - tile.first :].T, values[tile.rows])
