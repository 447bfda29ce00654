"""The gradients of the blocked path: every weight is computed again, tile by tile, and nothing of size B x M is kept.

Shapes: B queries, M keys, D embedding, C classes; a tile is [b, m]. With Z the mass and P the result of the forward,
G and g the gradients of result and log mass, and `v_j = w_j [c_j, 1]`:

    signal_i = [u_i, -a_i],   u_i = G_i / Z_i,   a_i = (<G_i, P_i> - g_i) / Z_i
    T_ij = S_ij <signal_i, v_j>                      what the exponent of the pair is worth
    dx_i = sum_j T_ij (y_j - x_i) / s_i^2            dy_j = sum_i T_ij (x_i - y_j) / s_i^2
    dc_j = w_j sum_i S_ij u_i                        ds_i = sum_j T_ij |x_i - y_j|^2 / s_i^3

Source: kernels.md section 2.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from scinet_kernels.blocked import Values, weighted_values
from scinet_kernels.tiling import Problem, Tile, Walk
from scinet_kernels.underflow import PanelGradients, Totals, differentiate, underflown

_ROWS_AT_ONCE = 2048


class Needs(NamedTuple):
    """Which gradients are wanted; that of `queries` includes their part as keys where the queries are the keys."""

    queries: bool
    keys: bool
    values: bool
    bandwidth: bool
    key_weights: bool


class Gradients(NamedTuple):
    """queries [B, D], keys [M, D], values [M, C], bandwidth [1] or [B], key_weights [M]; None where not wanted."""

    queries: Tensor | None
    keys: Tensor | None
    values: Tensor | None
    bandwidth: Tensor | None
    key_weights: Tensor | None


class _Pull:
    """`sum_j T_ij y_j` and `sum_j T_ij` of each row, which together make `sum_j T_ij (y_j - x_i)`."""

    def __init__(self, points: Tensor, dtype: torch.dtype) -> None:
        self.towards = torch.zeros(points.shape, dtype=dtype, device=points.device)
        self.total = torch.zeros(len(points), dtype=dtype, device=points.device)

    def finish(self, points: Tensor, centre: Tensor, unit: Tensor | float, factor: Tensor | None) -> Tensor:
        """Return `factor (towards - unit (x - centre) total)`, written over `towards`."""
        for rows in _blocks(len(points)):
            towards = self.towards[rows]
            towards.sub_((points[rows] - centre).mul_(unit).mul_(self.total[rows, None]))
            if factor is not None:
                towards.mul_(factor if factor.numel() == 1 else factor[rows, None])
        return self.towards


def backward(
    problem: Problem, result: Tensor, mass: Tensor, grad_result: Tensor, grad_log_mass: Tensor, needs: Needs
) -> Gradients:
    """Differentiate :func:`scinet_kernels.blocked.forward`.

    Args:
        problem: the operands of the forward.
        result: [B, C] its first result.
        mass: [B] its last result.
        grad_result: [B, C].
        grad_log_mass: [B].
        needs: which gradients are wanted.

    """
    values = weighted_values(problem)
    rows = underflown(mass)
    signal = _signal(values, result, mass, grad_result, grad_log_mass)
    signal[rows] = 0
    differentiated = _symmetric if problem.is_symmetric else _rectangular
    gradients = differentiated(problem, values, signal, needs)
    if len(rows):
        whole = values.columns[:, :0] if problem.values is None else problem.values.to(values.columns.dtype)
        totals = Totals(result, mass, values.largest_weight)
        for part in differentiate(problem, rows, whole, totals, grad_result, grad_log_mass):
            _add(problem, gradients, part)
    return gradients


def _signal(values: Values, result: Tensor, mass: Tensor, grad_result: Tensor, grad_log_mass: Tensor) -> Tensor:
    signal = torch.empty(len(mass), values.columns.shape[1], dtype=values.columns.dtype, device=mass.device)
    torch.div(grad_result, mass[:, None], out=signal[:, :-1])
    worth = torch.linalg.vecdot(grad_result.to(signal.dtype), result.to(signal.dtype) - values.mean)
    torch.div(grad_log_mass - worth, mass, out=signal[:, -1])
    return signal


def _symmetric(problem: Problem, values: Values, signal: Tensor, needs: Needs) -> Gradients:
    """One exponential for both directions: `A_ij = S_ij (<signal_i, v_j> + <v_i, signal_j>)` pulls i to j, j to i."""
    columns, points = values.columns, problem.queries
    needs_pull, needs_values = needs.queries or needs.bandwidth, needs.values or needs.key_weights
    walk = Walk(problem, num_tiles=1 + needs_pull)
    pull = _Pull(points if needs_pull else points[:0], problem.dtype)
    received = torch.zeros_like(signal)
    width = points.shape[1]
    for tile, left, right, exponents in walk:
        weights = exponents.exp_()
        mirror, has_mirror = tile.mirror - tile.first, tile.mirror < tile.column_end
        if needs_values:
            wide = weights.to(signal.dtype)
            received[tile.rows].addmm_(wide, signal[tile.columns])
            if has_mirror:
                received[tile.mirrored].addmm_(wide[:, mirror:].T, signal[tile.rows])
        if not needs_pull:
            continue
        left_worth = torch.cat([signal[tile.rows], columns[tile.rows]], 1).to(weights.dtype)
        right_worth = torch.cat([columns[tile.columns], signal[tile.columns]], 1).to(weights.dtype)
        weights.mul_(torch.mm(left_worth, right_worth.T, out=walk.buffer(1, tile)))
        _leave_out_self(walk, weights, tile)
        pull.towards[tile.rows].addmm_(weights, right[:, :width])
        pull.total[tile.rows] += weights.sum(1)
        if has_mirror:
            pull.towards[tile.mirrored].addmm_(weights[:, mirror:].T, left[:, :width])
            pull.total[tile.mirrored] += weights[:, mirror:].sum(0)
    of_values, of_weights = _of_values(problem, values, received, needs)
    if not needs_pull:
        return Gradients(None, None, of_values, None, of_weights)
    unit = walk.inverse if walk.scales_operands else 1.0
    factor = walk.inverse if walk.scales_operands else walk.inverse.square()
    of_points = pull.finish(points, walk.centre, unit, factor)
    of_bandwidth = None
    if needs.bandwidth:  # Euler: the result depends on x / s alone
        products = [torch.tensordot(points[rows] - walk.centre, of_points[rows]) for rows in _blocks(len(points))]
        of_bandwidth = -walk.inverse * torch.stack([*products, walk.inverse.new_zeros(())]).sum()
    return Gradients(of_points, None, of_values, of_bandwidth, of_weights)


def _rectangular(problem: Problem, values: Values, signal: Tensor, needs: Needs) -> Gradients:
    columns, width, dtype = values.columns, problem.queries.shape[1], problem.dtype
    is_self = problem.queries is problem.keys
    needs_queries, needs_keys = needs.queries or needs.bandwidth, needs.keys or (is_self and needs.queries)
    needs_values, needs_worth = needs.values or needs.key_weights, needs_queries or needs_keys
    walk = Walk(problem, num_tiles=1 + needs_worth)
    of_rows = _Pull(problem.queries if needs_queries else problem.queries[:0], dtype)
    of_columns = _Pull(problem.keys if needs_keys else problem.keys[:0], dtype)
    spread = signal.new_zeros(len(signal), dtype=dtype)  # sum_j T_ij |y_j|^2
    received = signal.new_zeros(len(columns), columns.shape[1])
    for tile, left, right, exponents in walk:
        weights = exponents.exp_()
        if needs_values:
            received[tile.columns].addmm_(weights.to(signal.dtype).T, signal[tile.rows])
        if not needs_worth:
            continue
        worth = walk.buffer(1, tile)
        weights.mul_(torch.mm(signal[tile.rows].to(dtype), columns[tile.columns].to(dtype).T, out=worth))
        _leave_out_self(walk, weights, tile)
        if needs_queries:
            of_rows.towards[tile.rows].addmm_(weights, right[:, :width])
            of_rows.total[tile.rows] += weights.sum(1)
        if needs.bandwidth:
            spread[tile.rows].addmv_(weights, right[:, width + 1], alpha=-2)
        if needs_keys:
            if not walk.scales_operands:
                walk.scale_rows(weights, tile.rows)
            of_columns.towards[tile.columns].addmm_(weights.T, left[:, :width])
            of_columns.total[tile.columns].addmv_(weights.T, left[:, width + 1])
    of_values, of_weights = _of_values(problem, values, received, needs)
    of_bandwidth = _of_bandwidth(problem, walk, of_rows, spread) if needs.bandwidth else None
    square = walk.inverse.square()
    queries = of_rows.finish(problem.queries, walk.centre, 1.0, square) if needs_queries else None
    keys = of_columns.finish(problem.keys, walk.centre, 1.0, None) if needs_keys else None
    if is_self and queries is not None and keys is not None:
        queries, keys = queries.add_(keys), None
    return Gradients(queries, keys, of_values, of_bandwidth, of_weights)


def _leave_out_self(walk: Walk, weights: Tensor, tile: Tile) -> None:
    """Zero the pull of a row at itself: it is nothing, but its large weight would leave rounding noise."""
    own = walk.own(weights, tile)
    if own is not None:
        own.zero_()


def _of_bandwidth(problem: Problem, walk: Walk, pull: _Pull, spread: Tensor) -> Tensor:
    """Return `ds_i`, from `|x - y|^2 = |x|^2 - 2 x y + |y|^2`; summed where all rows share one bandwidth."""
    parts = []
    for rows in _blocks(len(problem.queries)):
        points = problem.queries[rows] - walk.centre
        norms, products = torch.linalg.vecdot(points, points), torch.linalg.vecdot(points, pull.towards[rows])
        parts.append(norms * pull.total[rows] - 2 * products + spread[rows])
    worth = torch.cat([*parts, spread[:0]])
    return walk.inverse.pow(3) * (worth.sum().reshape(1) if walk.inverse.numel() == 1 else worth)


def _of_values(problem: Problem, values: Values, received: Tensor, needs: Needs) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of values and key weights from what the keys received, [M, C + 1]."""
    of_values = of_weights = None
    if needs.key_weights and values.weights is not None:
        cells = received.new_zeros(len(received), 0) if problem.values is None else problem.values - values.mean
        worth = torch.linalg.vecdot(cells.to(received.dtype), received[:, :-1]) + received[:, -1]
        of_weights = torch.where(values.weights > 0, worth / values.largest_weight, 0)
    if needs.values:
        of_values = received[:, :-1] if values.weights is None else received[:, :-1] * values.weights[:, None]
    return of_values, of_weights


def _add(problem: Problem, gradients: Gradients, part: PanelGradients) -> None:
    """Add what rows with a softmax of their own contribute."""
    is_self = problem.queries is problem.keys
    if gradients.queries is not None:
        gradients.queries[part.rows] += part.queries
    of_keys = gradients.queries if is_self else gradients.keys
    if of_keys is not None:
        of_keys += part.keys
    if gradients.values is not None:
        gradients.values.add_(part.values)
    if gradients.bandwidth is not None and len(gradients.bandwidth) == len(problem.queries):
        gradients.bandwidth[part.rows] += part.bandwidth
    elif gradients.bandwidth is not None:
        gradients.bandwidth.add_(part.bandwidth.sum())
    if gradients.key_weights is not None and part.key_weights is not None:
        gradients.key_weights.add_(part.key_weights)


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _ROWS_AT_ONCE):
        yield slice(start, min(start + _ROWS_AT_ONCE, count))
