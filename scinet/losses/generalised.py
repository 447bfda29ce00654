"""The generalised robust loss: between trust in, and doubt about, an unknown cell's being absent.

Shapes: B batch, C classes; observed is +1, -1, 0.

Source: Chen et al., "Boosting Single Positive Multi-label Classification with Generalized Robust Loss", IJCAI 2024.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scinet.losses.assumed import negative_log


class Robustness(NamedTuple):
    """The parameters of one epoch: slope and offset of the belief, centre and width of the weight."""

    slope: float
    offset: float
    centre: float
    width: float


def between(start: Robustness, end: Robustness, *, epoch: int, num_epochs: int) -> Robustness:
    """Return the parameters of an epoch, linear between start and end.

    As in the source, slope and offset begin at their start and stop one step before their end, centre and width are
    one step ahead.

    Args:
        start: values at the start.
        end: values at the end.
        epoch: finished epochs, from 0.
        num_epochs: T.
    """
    late, early = epoch / num_epochs, (epoch + 1) / num_epochs
    shares = (late, late, early, early)
    return Robustness(*(a + (b - a) * share for a, b, share in zip(start, end, shares, strict=True)))


def generalised_robust(
    logits: Tensor,
    observed: Tensor,
    *,
    robustness: Robustness,
    positive_power: float,
    negative_power: float,
    epsilon: float = 0.0,
) -> Tensor:
    """Return the loss of every cell (GR): [B, C].

    An unknown cell costs ``V [K (1 - p^q2) / q2 + (1 - K) (1 - (1 - p)^q3) / q3]``, ``K = sigmoid(slope p + offset)``
    the belief that it is present and ``V = exp(-(p - centre)^2 / (2 width^2))``, both without gradient.

    Args:
        logits: [B, C], any float dtype.
        observed: [B, C]; a known negative pays cross-entropy (in the source's code it pays nothing).
        robustness: of the epoch.
        positive_power: q2, 0.01.
        negative_power: q3, 1.
        epsilon: as in :func:`~scinet.losses.assumed.negative_log`; 1e-7 in the source.
    """
    probabilities = torch.sigmoid(logits)
    detached = probabilities.detach()
    belief = torch.sigmoid(robustness.slope * detached + robustness.offset)
    weight = torch.exp(-((detached - robustness.centre) / robustness.width).square() / 2)
    # powers as exponentials of log-sigmoids: the slope of p^q2 is not finite at 0
    present = -torch.expm1(-positive_power * negative_log(logits)) / positive_power
    absent = -torch.expm1(-negative_power * negative_log(-logits)) / negative_power
    unknown = weight * (belief * present + (1 - belief) * absent)
    return torch.where(observed == 0, unknown, negative_log(logits * observed.sign(), epsilon))
