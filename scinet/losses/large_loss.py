"""Large-loss modification: an assumed negative whose loss is among the largest is probably a false one.

Shapes: B batch, G global batch, C classes; observed is +1, -1, 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def rejected_cells(num_cells: int, percent: float, epoch: int, *, is_permanent: bool) -> int:
    """Return k, how many unknown cells of a global batch are taken for false negatives.

    ``ceil(G C percent / 100 (t - 1))`` in epoch t, counted from 1; ``ceil(G C percent / 100)`` from the second epoch on
    where corrections are permanent. None in the first epoch.

    Args:
        num_cells: G * C.
        percent: Delta_rel, percent of all cells.
        epoch: finished epochs, t - 1.
        is_permanent: whether corrections are (LL-Cp).
    """
    if epoch == 0:
        return 0
    share = percent / 100 * (1 if is_permanent else epoch)
    return min(num_cells, math.ceil(num_cells * share))


def smallest_rejected_loss(logits: Tensor, observed: Tensor, count: int) -> Tensor:
    """Return the k-th largest loss among the unknown cells of a global batch, where known cells count as 0: [] fp.

    Args:
        logits: [G, C].
        observed: [G, C].
        count: k, at least 1.
    """
    losses = torch.where(observed == 0, functional.softplus(logits), 0.0)
    return losses.flatten().topk(count).values[-1]


def is_rejected(logits: Tensor, observed: Tensor, smallest: Tensor, *, strictly: bool = False) -> Tensor:
    """Return which unknown cells cost at least ``smallest`` as negatives: [B, C] bool.

    Args:
        logits: [B, C].
        observed: [B, C].
        smallest: of :func:`smallest_rejected_loss`.
        strictly: more than that, as the source asks before it changes a label for good.
    """
    losses = functional.softplus(logits)
    return (observed == 0) & (losses > smallest if strictly else losses >= smallest)


def large_loss(logits: Tensor, observed: Tensor, rejected: Tensor, *, corrects: bool) -> Tensor:
    """Return the loss of each cell, unknown ones as negatives, rejected ones left out or as positives: [B, C].

    Args:
        logits: [B, C].
        observed: [B, C]; known negatives stay negatives.
        rejected: [B, C] bool.
        corrects: a rejected cell pays as a positive (LL-Ct, LL-Cp); it pays nothing otherwise (LL-R).

    Source: Kim et al., "Large Loss Matters in Weakly Supervised Multi-Label Classification", CVPR 2022.
    """
    positive, negative = functional.softplus(-logits), functional.softplus(logits)
    cells = torch.where(observed > 0, positive, negative)
    return torch.where(rejected, positive if corrects else 0.0, cells)
