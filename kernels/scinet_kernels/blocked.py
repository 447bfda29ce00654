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
from scinet_kernels.tiling import Frame, Problem, Walk, frame_of
from scinet_kernels.underflow import are_nothing, marked, recompute, underflown


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
    weights, largest = _scaled_weights(problem, dtype)
    if weights is not None:
        columns *= weights[:, None]
    return Values(columns, mean, weights, largest)


def _scaled_weights(problem: Problem, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """Return the key weights over the largest, and the largest; 1 where no key counts."""
    weights, largest = problem.pairs.key_weights, torch.ones((), dtype=dtype, device=problem.keys.device)
    if weights is not None and len(weights):
        weights = torch.where(weights > 0, weights, 0).to(dtype)
        largest = torch.where(weights.amax() > 0, weights.amax(), 1)
        weights = weights / largest
    return weights, largest


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Propagate, and sum the weights.

    Args:
        problem: the operands.

    Returns:
        (result [B, C], log mass [B], mass [B] as the tiles summed it, for the backward: in units of the largest key
        weight, and where it underflows :func:`~scinet_kernels.underflow.marked`).

    """
    values, frame = weighted_values(problem), frame_of(problem)
    sums = values.columns.new_zeros(len(problem.queries), values.columns.shape[1])
    if compiled_tiles.runs(problem, values.columns):
        compiled_tiles.propagate(problem, frame, values.columns, values.weights, sums)
    else:
        _propagate(problem, frame, values.columns, sums)
    mass = sums[:, -1].clone()
    result = (sums[:, :-1] / mass[:, None]).add_(values.mean)
    log_mass = (mass * values.largest_weight).log().to(problem.dtype)
    rows = underflown(mass)
    if len(rows) and problem.log_mass_elsewhere is not None:
        is_nothing = are_nothing(rows, mass_of(problem, problem.log_mass_elsewhere))
        nothing, rows = rows[is_nothing], rows[~is_nothing]
        result[nothing], log_mass[nothing] = 0 * sums[nothing, :-1], -torch.inf  # NaN in a value stays in its column
    if len(rows):
        whole = problem.queries.new_zeros(len(problem.keys), 0) if problem.values is None else problem.values
        for some, part, log_part in recompute(problem, rows, whole.to(result.dtype)):
            result[some], log_mass[some] = part, log_part
            mass[some] = log_part.to(mass.dtype) - values.largest_weight.log()
    return result, log_mass, mass


def _propagate(problem: Problem, frame: Frame, values: Tensor, sums: Tensor) -> None:
    for tile, _, _, exponents in Walk(problem, frame, num_tiles=1):
        weights = exponents.exp_().to(sums.dtype)
        sums[tile.rows].addmm_(weights, values[tile.columns])
        if tile.mirror < tile.column_end:
            sums[tile.mirrored].addmm_(weights[:, tile.mirror - tile.first :].T, values[tile.rows])


def mass_of(problem: Problem, log_mass: Tensor) -> Tensor:
    """Return what :func:`forward` would give last, had it found this log mass.

    Args:
        problem: the operands; where keys go round the ranks, one shard of them.
        log_mass: [B], where keys go round that over all shards.

    """
    dtype = problem.dtype if problem.values is None else torch.promote_types(problem.values.dtype, problem.dtype)
    _, largest = _scaled_weights(problem, dtype)
    logarithm = log_mass.to(dtype) - largest.log()
    return marked(logarithm.exp(), logarithm)
