"""Losses that know how many positives an image has on average: EPR, and ROLE, which also estimates every label.

Shapes: B batch, C classes; observed is +1, -1, 0.

Source: Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scinet.losses.assumed import negative_log


def expected_positives(logits: Tensor, *, expected: float, mean: Tensor | None = None) -> Tensor:
    """Return each image's share of ``C ((mean - expected) / C)^2``, the expected positive regulariser: [B].

    Args:
        logits: [B, C], any float dtype.
        expected: k, positives an image.
        mean: [], mean over the global batch of an image's summed probabilities, without gradient; None: this batch is
            the whole. Value and gradient are then those of the global batch, whatever its parts.
    """
    sums = torch.sigmoid(logits).sum(1)
    if mean is None:
        mean = sums.mean().detach()
    excess = (mean - expected) / logits.shape[1]
    # the square's value, and its gradient through this image's own sum
    return excess * (mean - expected) + 2 * excess * (sums - sums.detach())


def towards_estimates(logits: Tensor, estimates: Tensor, observed: Tensor, *, epsilon: float = 0.0) -> Tensor:
    """Return one half of ROLE: ``(l+ on known positives + cross-entropy to the other side's probabilities) / 2``.

    The classifier pays it towards the label estimates, and the estimates towards the classifier: [B, C].

    Args:
        logits: [B, C] of the side that learns.
        estimates: [B, C] probabilities of the other side, without gradient.
        observed: [B, C]; known negatives pay l- alike (the source has none).
        epsilon: as in :func:`~scinet.losses.assumed.negative_log`.
    """
    positive, negative = negative_log(logits, epsilon), negative_log(-logits, epsilon)
    known = torch.where(observed > 0, positive, torch.where(observed < 0, negative, 0.0))
    return (known + estimates * positive + (1 - estimates) * negative) / 2
