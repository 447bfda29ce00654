"""Asymmetric focal losses: positives and negatives are focused on differently.

All return the loss of every cell, [B, C]; the sources sum them over the batch. Shapes: B batch, C classes; observed is
+1, -1, 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_SMALLEST = 1e-8


def asymmetric(
    logits: Tensor,
    observed: Tensor,
    *,
    gamma_positive: float,
    gamma_negative: float,
    margin: float,
    gamma_unknown: float | None,
    detaches_focus: bool = False,
) -> Tensor:
    """Return the asymmetric loss (ASL).

    A positive costs ``-(1 - p)^g+ log p``, a negative ``-q^g- log(1 - q)`` with ``q = max(p - margin, 0)``.

    Args:
        logits: [B, C], any float dtype.
        observed: [B, C].
        gamma_positive: g+.
        gamma_negative: g-, of known negatives.
        margin: probability below which a negative costs nothing.
        gamma_unknown: an unknown cell is a negative with this focus; None: it costs nothing.
        detaches_focus: whether the focus is a weight without gradient.

    Source: Ridnik et al., "Asymmetric Loss For Multi-Label Classification", ICCV 2021.
    """
    probabilities = torch.sigmoid(logits)
    shifted = (probabilities - margin).clamp_min(0)
    # without a margin the logarithm is had from the logit; with one, 1 - q is at least the margin
    negative = functional.softplus(logits) if margin == 0 else -torch.log1p(-shifted)
    positive = functional.softplus(-logits)
    of_unknown = logits.new_tensor(gamma_negative if gamma_unknown is None else gamma_unknown)
    gamma = torch.where(observed == 0, of_unknown, gamma_negative)
    miss, hit = 1 - probabilities, shifted
    if detaches_focus:
        miss, hit = miss.detach(), hit.detach()
    cells = torch.where(observed > 0, _power(miss, gamma_positive) * positive, _power(hit, gamma) * negative)
    return cells if gamma_unknown is not None else torch.where(observed == 0, 0.0, cells)


def _power(base: Tensor, exponent: float | Tensor) -> Tensor:
    """Return a power whose gradient is finite at 0."""
    return torch.pow(base.clamp_min(_SMALLEST), exponent)
