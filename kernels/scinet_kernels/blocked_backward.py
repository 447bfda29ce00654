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

from scinet_kernels import compiled_tiles
from scinet_kernels.blocked import Values, weighted_values
from scinet_kernels.tiling import Frame, Problem, Pull, Sums, Tile, Walk, frame_of
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
    frame = frame_of(problem)
    sums = _no_sums(problem, signal, needs)
    if compiled_tiles.runs(problem, signal):
        compiled_tiles.differentiate(
            problem, frame, values.columns, values.weights, signal, sums,
            received_columns=signal.shape[1] - (not needs.key_weights),
        )  # fmt: skip
    else:
        (_symmetric if problem.is_symmetric else _rectangular)(problem, frame, values.columns, signal, sums)
    gradients = _finish(problem, frame, values, sums, needs)
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


def _no_sums(problem: Problem, signal: Tensor, needs: Needs) -> Sums:
    """Return zeros for every sum that the wanted gradients need."""
    is_self, dtype = problem.queries is problem.keys, problem.dtype
    needs_rows, needs_columns = needs.queries or needs.bandwidth, needs.keys or (is_self and needs.queries)

    def pull(points: Tensor) -> Pull:
        return Pull(
            torch.zeros(points.shape, dtype=dtype, device=points.device), signal.new_zeros(len(points), dtype=dtype)
        )

    return Sums(
        received=signal.new_zeros(len(problem.keys), signal.shape[1]) if needs.values or needs.key_weights else None,
        rows=pull(problem.queries) if needs_rows else None,
        columns=pull(problem.keys) if needs_columns and not problem.is_symmetric else None,
        spread=signal.new_zeros(len(signal), dtype=dtype) if needs.bandwidth and not problem.is_symmetric else None,
    )


def _symmetric(problem: Problem, frame: Frame, values: Tensor, signal: Tensor, sums: Sums) -> None:
    """One exponential for both directions: `A_ij = S_ij (<signal_i, v_j> + <v_i, signal_j>)` pulls i to j, j to i."""
    pull, received = sums.rows, sums.received
    walk = Walk(problem, frame, num_tiles=1 + (pull is not None))
    width = problem.queries.shape[1]
    for tile, left, right, exponents in walk:
        weights = exponents.exp_()
        mirror, has_mirror = tile.mirror - tile.first, tile.mirror < tile.column_end
        if received is not None:
            wide = weights.to(signal.dtype)
            received[tile.rows].addmm_(wide, signal[tile.columns])
            if has_mirror:
                received[tile.mirrored].addmm_(wide[:, mirror:].T, signal[tile.rows])
        if pull is None:
            continue
        left_worth = torch.cat([signal[tile.rows], values[tile.rows]], 1).to(weights.dtype)
        right_worth = torch.cat([values[tile.columns], signal[tile.columns]], 1).to(weights.dtype)
        weights.mul_(torch.mm(left_worth, right_worth.T, out=walk.buffer(1, tile)))
        walk.scale_rows(weights, tile.rows)
        _leave_out_self(walk, weights, tile)
        pull.towards[tile.rows].addmm_(weights, right[:, :width])
        pull.total[tile.rows] += weights.sum(1)
        if has_mirror:
            pull.towards[tile.mirrored].addmm_(weights[:, mirror:].T, left[:, :width])
            pull.total[tile.mirrored] += weights[:, mirror:].sum(0)


def _rectangular(problem: Problem, frame: Frame, values: Tensor, signal: Tensor, sums: Sums) -> None:
    needs_worth = sums.rows is not None or sums.columns is not None
    walk = Walk(problem, frame, num_tiles=1 + needs_worth)
    width, dtype = problem.queries.shape[1], problem.dtype
    for tile, left, right, exponents in walk:
        weights = exponents.exp_()
        if sums.received is not None:
            sums.received[tile.columns].addmm_(weights.to(signal.dtype).T, signal[tile.rows])
        if not needs_worth:
            continue
        worth = walk.buffer(1, tile)
        weights.mul_(torch.mm(signal[tile.rows].to(dtype), values[tile.columns].to(dtype).T, out=worth))
        walk.scale_rows(weights, tile.rows)
        _leave_out_self(walk, weights, tile)
        if sums.rows is not None:
            sums.rows.towards[tile.rows].addmm_(weights, right[:, :width])
            sums.rows.total[tile.rows] += weights.sum(1)
        if sums.spread is not None:
            sums.spread[tile.rows].addmv_(weights, right[:, width + 1], alpha=-2)
        if sums.columns is not None:
            sums.columns.towards[tile.columns].addmm_(weights.T, left[:, :width])
            sums.columns.total[tile.columns] += weights.sum(0)


def _leave_out_self(walk: Walk, weights: Tensor, tile: Tile) -> None:
    """Zero the pull of a row at itself: it is nothing, but its large weight would leave rounding noise."""
    own = walk.own(weights, tile)
    if own is not None:
        own.zero_()


def _finish(problem: Problem, frame: Frame, values: Values, sums: Sums, needs: Needs) -> Gradients:
    """Turn the sums into gradients, in place."""
    of_values, of_weights = _of_values(problem, values, sums.received, needs)
    of_bandwidth = None
    if sums.rows is not None and sums.spread is not None:
        of_bandwidth = _of_bandwidth(problem, frame, sums.rows, sums.spread)
    queries = None if sums.rows is None else _pulled(sums.rows, problem.queries, frame)
    keys = None if sums.columns is None else _pulled(sums.columns, problem.keys, frame)
    if problem.is_symmetric and needs.bandwidth and queries is not None:  # Euler: the result depends on x / s alone
        points = problem.queries
        products = [torch.tensordot(points[rows] - frame.centre, queries[rows]) for rows in _blocks(len(points))]
        of_bandwidth = -frame.inverse * torch.stack([*products, frame.inverse.new_zeros(())]).sum()
    if problem.queries is problem.keys and queries is not None and keys is not None:
        queries, keys = queries.add_(keys), None
    return Gradients(queries, keys, of_values, of_bandwidth, of_weights)


def _pulled(pull: Pull, points: Tensor, frame: Frame) -> Tensor:
    """Return the gradient of the points, written over `pull.towards`."""
    for rows in _blocks(len(points)):
        towards = pull.towards[rows]
        towards.sub_(frame.measured(points[rows]).mul_(pull.total[rows, None])).mul_(frame.unit)
    return pull.towards


def _of_bandwidth(problem: Problem, frame: Frame, pull: Pull, spread: Tensor) -> Tensor:
    """Return `ds_i`, from `|x - y|^2 = |x|^2 - 2 x y + |y|^2`; summed where all rows share one bandwidth."""
    parts = []
    for rows in _blocks(len(problem.queries)):
        points = frame.measured(problem.queries[rows])
        norms, products = torch.linalg.vecdot(points, points), torch.linalg.vecdot(points, pull.towards[rows])
        parts.append(norms * pull.total[rows] - 2 * products + spread[rows])
    worth = torch.cat([*parts, spread[:0]])
    return frame.inverse * (worth.sum().reshape(1) if frame.inverse.numel() == 1 else worth)


def _of_values(
    problem: Problem, values: Values, received: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of values and key weights from what the keys received, [M, C + 1]."""
    of_values = of_weights = None
    if received is None:
        return None, None
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
