"""Query rows so far from every key that the blocked path's plain sum of weights underflows: done with a softmax.

Shapes: b of the B queries, M keys, D embedding, C classes. These rows are rare, and a panel [b, M] of them is stored.
Where keys go round the ranks (`ring.py`) a problem holds one shard of them, and its totals are those of all shards.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from scinet_kernels import reference
from scinet_kernels.tiling import Problem

# A sum of weights below this may have lost terms; the softmax subtracts the largest exponent first.
_SMALLEST_MASS = 1e-20
# Beside this much elsewhere a sum below the smallest is less than a tenth of float64's last digit.
_MUCH_ELSEWHERE = 1e-3


class _Panel(NamedTuple):
    """Some query rows [b] with their logits [b, M]; queries [b, D] and keys [M, D] are centred, scale is [b, 1]."""

    rows: Tensor
    queries: Tensor
    keys: Tensor
    scale: Tensor
    logits: Tensor


class Totals(NamedTuple):
    """What the forward found over all keys: result [B, C]; mass [B] as :func:`marked` in units of the weight `unit`."""

    result: Tensor
    mass: Tensor
    unit: Tensor


class PanelGradients(NamedTuple):
    """Gradients of rows [b]: queries [b, D], keys [M, D], values [M, C], bandwidth [b] and key weights [M]."""

    rows: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    bandwidth: Tensor
    key_weights: Tensor | None


def underflown(mass: Tensor) -> Tensor:
    """Return the rows [b] whose mass [B], :func:`marked` or not, is too small to trust; a NaN is not small."""
    return (mass < _SMALLEST_MASS).nonzero()[:, 0]


def are_nothing(rows: Tensor, mass_elsewhere: Tensor) -> Tensor:
    """Return which of the underflown rows [b] are nothing beside the mass [B], in the same units, of other keys."""
    return mass_elsewhere[rows] > _MUCH_ELSEWHERE


def marked(mass: Tensor, log_mass: Tensor) -> Tensor:
    """Return the mass [B], and in its place where it is too small to trust its logarithm, which is negative."""
    return torch.where(mass < _SMALLEST_MASS, log_mass, mass)


def recompute(problem: Problem, rows: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield rows [b], their result [b, C] and their log mass [b].

    Args:
        problem: the whole one.
        rows: query rows.
        values: [M, C].

    """
    for panel in _panels(problem, rows):
        yield panel.rows, reference.normalise(panel.logits).to(values.dtype) @ values, reference.log_mass(panel.logits)


def differentiate(
    problem: Problem, rows: Tensor, values: Tensor, totals: Totals, grad_result: Tensor, grad_log_mass: Tensor
) -> Iterator[PanelGradients]:
    """Yield the gradients of those rows' operands; formulas as in `blocked_backward.py`.

    Args:
        problem: the whole one.
        rows: query rows.
        values: [M, C].
        totals: what the forward found.
        grad_result: [B, C].
        grad_log_mass: [B].

    """
    key_weights = problem.pairs.key_weights
    for panel in _panels(problem, rows):
        weights = reference.normalise(panel.logits) * _share(panel, totals)[:, None]
        signal, inverse = grad_result[panel.rows].to(values.dtype), panel.scale.reciprocal()
        worth = (signal @ values.T).to(weights.dtype)
        # what keys outside this problem add to the result; exactly nothing where there are none
        elsewhere = totals.result[panel.rows] - weights.to(values.dtype) @ values
        offset = (weights * worth).sum(1) + torch.linalg.vecdot(signal, elsewhere).to(weights.dtype)
        worth = weights * (worth - (offset - grad_log_mass[panel.rows])[:, None])
        of_weights = None
        if key_weights is not None:
            of_weights = torch.where(key_weights > 0, worth.sum(0) / key_weights, 0)
        if problem.pairs.own is not None:
            worth.scatter_(1, problem.pairs.own[panel.rows, None], 0)
        squared = reference.squared_distance(panel.queries, panel.keys)
        scaled = worth * inverse * inverse
        yield PanelGradients(
            panel.rows,
            scaled @ panel.keys - panel.queries * scaled.sum(1, keepdim=True),
            scaled.T @ panel.queries - panel.keys * scaled.sum(0)[:, None],
            weights.to(signal.dtype).T @ signal,
            ((scaled * squared).sum(1, keepdim=True) * inverse)[:, 0],
            of_weights,
        )


def _share(panel: _Panel, totals: Totals) -> Tensor:
    """Return the part [b] of the total mass that is this problem's: 1 where it holds all keys, 0 in rows without any.

    The logarithms go through the same steps as in the forward, so that rounding cannot make the 1 another number.
    """
    log_mass = reference.log_mass(panel.logits)
    own = log_mass.to(totals.mass.dtype) - totals.unit.log()
    share = (own - totals.mass[panel.rows]).masked_fill(own == -torch.inf, -torch.inf).exp()
    return share.to(log_mass.dtype)


def _panels(problem: Problem, rows: Tensor) -> Iterator[_Panel]:
    pairs, dtype = problem.pairs, problem.dtype
    queries, keys = reference.centred(problem.queries.to(dtype), problem.keys.to(dtype))
    bandwidth = problem.bandwidth.to(dtype).expand(len(queries))
    size = max(1, problem.workspace_bytes // (reference.pair_bytes(dtype) * max(1, len(keys))))
    for some in torch.split(rows, size):
        rules = replace(
            pairs,
            own=None if pairs.own is None else pairs.own[some],
            query_ids=None if pairs.query_ids is None else pairs.query_ids[some],
        )
        logits = reference.log_weights(queries[some], keys, bandwidth[some], rules)
        yield _Panel(some, queries[some], keys, bandwidth[some, None], logits)
