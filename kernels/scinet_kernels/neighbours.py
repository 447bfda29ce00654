"""The k nearest keys of each query, chosen tile by tile, and Gaussian weights over those alone; on every device.

Shapes: B queries, M keys, D embedding, C classes, K neighbours. The choice is held fixed in the backward.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scinet_kernels import reference
from scinet_kernels.tiling import Problem, Walk, frame_of


@torch.no_grad()
def select(problem: Problem, k: int) -> Tensor:
    """Choose the k nearest allowed keys of each query; among equal distances the lower index.

    Args:
        problem: the operands; its bandwidth and values are not looked at.
        k: number of keys wanted.

    Returns:
        [B, k] int64 in ascending order, -1 (last) where fewer keys are allowed.

    """
    # on its own tensor the walk is not symmetric: each row must see its keys in ascending order
    plain = problem._replace(keys=problem.keys.view_as(problem.keys), bandwidth=problem.queries.new_ones(1))
    closeness = problem.queries.new_full((len(problem.queries), k), -torch.inf, dtype=problem.dtype)
    index = torch.full_like(closeness, len(problem.keys), dtype=torch.int64)
    weights = problem.pairs.key_weights
    for tile, _, _, exponents in Walk(plain, frame_of(plain), num_tiles=1):
        if weights is not None:
            exponents.masked_fill_(~(weights[tile.columns] > 0), -torch.inf)
        columns = _largest(exponents, k)
        offered = torch.cat([closeness[tile.rows], exponents.gather(1, columns)], 1)
        places = torch.cat([index[tile.rows], columns + tile.first], 1)
        best = offered.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
        closeness[tile.rows], index[tile.rows] = offered.gather(1, best), places.gather(1, best)
    index.masked_fill_(closeness == -torch.inf, len(problem.keys))
    index = index.sort(dim=1).values
    return index.masked_fill_(index == len(problem.keys), -1)


def _largest(cells: Tensor, k: int) -> Tensor:
    """Return the columns of each row's k largest cells, ascending; among equals the lower ones."""
    if k >= cells.shape[1]:
        return torch.arange(cells.shape[1], device=cells.device).expand(cells.shape)
    found = cells.topk(k, dim=1)
    smallest = found.values[:, -1:]
    columns = found.indices.sort(dim=1).values
    is_tied = ((cells >= smallest).sum(1) > k) & (smallest[:, 0] > -torch.inf)
    rows = is_tied.nonzero()[:, 0]
    if len(rows):
        ordered = cells[rows].sort(dim=1, descending=True, stable=True).indices[:, :k]
        columns[rows] = ordered.sort(dim=1).values
    return columns


def nearest(problem: Problem, k: int) -> tuple[Tensor, Tensor]:
    """Find the k nearest keys and measure them by explicit difference.

    Args:
        problem: the operands; its bandwidth and values are not looked at.
        k: number of keys wanted.

    Returns:
        (index [B, k] int64, squared distance [B, k]) nearest first; -1 and inf where there are fewer than k.

    """
    index = select(problem, min(k, len(problem.keys)))

    def measure(rows: slice) -> Tensor:
        return _squared(problem, index, rows)

    squared = _map_rows(measure, problem.queries, index, problem.workspace_bytes)
    order = squared.detach().sort(dim=1, stable=True).indices
    padding = (0, k - index.shape[1])
    return (
        torch.nn.functional.pad(index.gather(1, order), padding, value=-1),
        torch.nn.functional.pad(squared.gather(1, order), padding, value=torch.inf),
    )


def propagate(problem: Problem, k: int) -> Tensor:
    """Average the values of the k nearest keys with Gaussian weights.

    Args:
        problem: the operands, with values.
        k: number of keys that count, at most M.

    Returns:
        [B, C] in the dtype of the values, at least fp32.

    """
    assert problem.values is not None
    index = select(problem, k)
    values = problem.values.to(torch.promote_types(problem.values.dtype, torch.float32))
    dtype = torch.promote_types(values.dtype, problem.dtype)

    def average(rows: slice) -> Tensor:
        weights = reference.normalise(_log_weights(problem, index, rows)).to(dtype)
        return torch.einsum("bk,bkc->bc", weights, values[index[rows].clamp_min(0)].to(dtype)).to(values.dtype)

    return _map_rows(average, problem.queries, index, problem.workspace_bytes)


def mass(problem: Problem, k: int) -> Tensor:
    """Return the logarithm of the sum of the k nearest keys' weights, [B].

    Args:
        problem: the operands.
        k: number of keys that count, at most M.

    """
    index = select(problem, k)

    def total(rows: slice) -> Tensor:
        return reference.log_mass(_log_weights(problem, index, rows))

    return _map_rows(total, problem.queries, index, problem.workspace_bytes)


def _squared(problem: Problem, index: Tensor, rows: slice) -> Tensor:
    if not index.shape[1]:
        return problem.queries.new_zeros(index[rows].shape, dtype=problem.dtype)
    chosen = problem.keys[index[rows].clamp_min(0)].to(problem.dtype)
    squared = (problem.queries[rows, None].to(problem.dtype) - chosen).square().sum(2)
    return squared.masked_fill(index[rows] < 0, torch.inf)


def _log_weights(problem: Problem, index: Tensor, rows: slice) -> Tensor:
    dtype, chosen = problem.dtype, index[rows]
    squared = _squared(problem, index, rows)
    scale = problem.bandwidth.to(dtype).expand(len(problem.queries))[rows, None]
    is_missing = chosen < 0
    logits = squared.masked_fill(is_missing, 0) / scale / scale * -0.5
    if problem.pairs.key_weights is not None:
        logits = logits + problem.pairs.key_weights[chosen.clamp_min(0)].masked_fill(is_missing, 1).log().to(dtype)
    return logits.masked_fill(is_missing, -torch.inf)


def _map_rows(fold: Callable[[slice], Tensor], queries: Tensor, index: Tensor, workspace_bytes: int) -> Tensor:
    """Apply `fold` to a few rows at a time; the backward computes each chunk again."""
    held = 4 * queries.shape[1] * index.shape[1] * torch.promote_types(queries.dtype, torch.float32).itemsize
    rows = max(1, workspace_bytes // max(1, held))
    chunks = [slice(start, start + rows) for start in range(0, max(1, len(queries)), rows)]
    if len(chunks) == 1 or not torch.is_grad_enabled():
        return torch.cat([fold(chunk) for chunk in chunks])
    return torch.cat([checkpoint(fold, chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])
