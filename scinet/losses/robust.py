"""Losses that bear missing labels: the negatives' cost falls again, or turns, where the prediction is confident.

Both return the loss of every cell, [B, C]; the source sums them over the batch. Shapes: B batch, C classes; observed
is +1, -1, 0; known negatives pay as the source's negatives do.

Source: Zhang et al., "Simple and Robust Loss Design for Multi-Label Learning with Missing Labels", 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scinet.losses.supervised import focal


def hill(logits: Tensor, observed: Tensor, *, ceiling: float, margin: float, gamma: float) -> Tensor:
    """Return the Hill loss: a negative costs ``(ceiling - p) p^2``, whose slope falls for confident predictions.

    Args:
        logits: [B, C], any float dtype.
        observed: [B, C].
        ceiling: lambda, 1.5.
        margin: subtracted from the logit of a positive, 1.
        gamma: focus of positives, 2.
    """
    probabilities = torch.sigmoid(logits)
    negative = (ceiling - probabilities) * probabilities.square()
    return torch.where(observed > 0, focal(logits - margin, gamma), negative)


def self_paced(
    logits: Tensor, observed: Tensor, *, threshold: float, margin: float, gamma: float, corrects: bool
) -> Tensor:
    """Return the focal-margin loss in which a confident unknown cell is a positive (SPLC).

    Args:
        logits: [B, C], any float dtype.
        observed: [B, C]; known negatives stay negatives (the source has none).
        threshold: tau, 0.6: an unknown cell whose probability is above it is corrected.
        margin: subtracted from the logit of a known positive, 1; not of a corrected one.
        gamma: focus, 2.
        corrects: whether the epoch has come from which labels are corrected.
    """
    is_corrected = (observed == 0) & (torch.sigmoid(logits) > threshold)
    positive = torch.where(observed > 0, focal(logits - margin, gamma), focal(logits, gamma))
    is_positive = (observed > 0) | is_corrected if corrects else observed > 0
    return torch.where(is_positive, positive, focal(-logits, gamma))
