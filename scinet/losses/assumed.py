"""Losses that read an unknown label as absent, with less trust or not at all.

All return the loss of every cell, [B, C]; the caller sums and divides by the global batch size (the sources take the
mean over cells, which is 1 / C of that). Shapes: B batch, C classes; observed is +1 present, -1 absent, 0 unknown.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def negative_log(logits: Tensor, epsilon: float = 0.0) -> Tensor:
    """Return ``-log(sigmoid(logits) + epsilon)``: the cost of a positive; of a negative, with the logit's sign turned.

    Args:
        logits: any shape and float dtype.
        epsilon: 0 is exact; 1e-5 is what the code of Cole et al. and of Zhou et al. adds to every probability.
    """
    return -torch.log(torch.sigmoid(logits) + epsilon) if epsilon else functional.softplus(-logits)


def known_cells(logits: Tensor, observed: Tensor) -> Tensor:
    """Return binary cross-entropy on known cells, 0 on unknown ones (BCE, "ignore unobserved").

    Args:
        logits: [B, C], any float dtype.
        observed: [B, C].
    """
    return torch.where(observed == 0, 0.0, negative_log(logits * observed.sign()))


def assume_negative(
    logits: Tensor, observed: Tensor, *, smoothing: float = 0.0, unknown_weight: float = 1.0, epsilon: float = 0.0
) -> Tensor:
    """Return binary cross-entropy with unknown cells taken as negatives (AN, AN-LS, WAN).

    ``(1 - e) l(target) + e l(other target)``, times ``unknown_weight`` where unknown. Known negatives weigh 1.

    Args:
        logits: [B, C], any float dtype.
        observed: [B, C].
        smoothing: e in [0, 1]; 0.1 in AN-LS.
        unknown_weight: 1 in AN; 1 / (C - 1) in WAN.
        epsilon: as in :func:`negative_log`.

    Source: Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021.
    """
    towards = torch.where(observed > 0, logits, -logits)
    cells = (1 - smoothing) * negative_log(towards, epsilon) + smoothing * negative_log(-towards, epsilon)
    return torch.where(observed == 0, unknown_weight * cells, cells)
