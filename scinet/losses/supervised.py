"""Losses on labels. All return the sum over the cells of a batch; the caller divides by the global batch size.

Shapes: B batch, C classes. Logits are fp32; probabilities never enter a logarithm.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def binary_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of binary cross-entropy.

    Args:
        logits: [B, C].
        targets: [B, C] in [0, 1], soft targets allowed.
        weights: [B, C], 0 leaves a cell out.
    """
    cells = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (weights * cells).sum()


def focal_margin(logits: Tensor, targets: Tensor, weights: Tensor, *, gamma: float, margin: float) -> Tensor:
    """Return the weighted sum of the focal-margin loss.

    A positive costs ``-(1-q)^gamma log q`` with ``q = sigmoid(z - margin)``, a negative ``-p^gamma log(1-p)`` with
    ``p = sigmoid(z)``; a soft target mixes the two.

    Args:
        logits: [B, C].
        targets: [B, C] in [0, 1].
        weights: [B, C].
        gamma: focusing exponent.
        margin: subtracted from the logit of a positive.

    Source: Zhang et al., "Simple and Robust Loss Design for Multi-Label Learning with Missing Labels" (SPLC), 2021.
    """
    positive, negative = focal(logits - margin, gamma), focal(-logits, gamma)
    return (weights * (targets * positive + (1 - targets) * negative)).sum()


def focal(logits: Tensor, gamma: float) -> Tensor:
    """Return ``-(1-q)^gamma log q`` with ``q = sigmoid(logits)``: a positive's cost; a negative's with the sign turned.

    Args:
        logits: any shape and float dtype.
        gamma: focusing exponent.
    """
    # (1-q)^gamma as an exponential: a power's gradient is not finite at 0 where gamma < 1
    return -torch.exp(gamma * functional.logsigmoid(-logits)) * functional.logsigmoid(logits)
