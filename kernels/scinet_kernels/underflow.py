"""Query rows so far from every key that the blocked path's plain sum of weights underflows: done with a softmax.

Shapes: b of the B queries, M keys, D embedding, C classes. These rows are rare, and a panel [b, M] of them is stored.
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


class _Panel(NamedTuple):
    """Some query rows [b] with their logits [b, M]; queries [b, D] and keys [M, D] are centred, scale is [b, 1]."""

    rows: Tensor
    queries: Tensor
    keys: Tensor
    scale: Tensor
    logits: Tensor


class PanelGradients(NamedTuple):
    """Gradients of rows [b]: queries [b, D], keys [M, D], values [M, C], bandwidth [b] and key weights [M]."""

    rows: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    bandwidth: Tensor
    key_weights: Tensor | None


def underflown(mass: Tensor) -> Tensor:
    """Return the rows [b] whose mass [B] is too small to trust; a NaN is not small."""
    return (mass < _SMALLEST_MASS).nonzero()[:, 0]


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
    problem: Problem, rows: Tensor, values: Tensor, grad_result: Tensor, grad_log_mass: Tensor
) -> Iterator[PanelGradients]:
    """Yield the gradients of those rows' operands; formulas as in `blocked_backward.py`.

    Args:
        problem: the whole one.
        rows: query rows.
        values: [M, C].
        grad_result: [B, C].
        grad_log_mass: [B].

    """
    key_weights = problem.pairs.key_weights
    for panel in _panels(problem, rows):
        weights = reference.normalise(panel.logits)
        signal, inverse = grad_result[panel.rows].to(values.dtype), panel.scale.reciprocal()
        worth = (signal @ values.T).to(weights.dtype)
        worth = weights * (worth - (weights * worth).sum(1, keepdim=True) + grad_log_mass[panel.rows, None])
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
