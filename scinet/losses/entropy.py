"""Entropy maximisation: where nothing is known, a classifier should commit itself slowly.

All return the loss of every cell, [B, C]. Shapes: B batch, C classes; observed is +1, -1, 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scinet.losses.assumed import negative_log


def entropy(logits: Tensor, epsilon: float = 0.0) -> Tensor:
    """Return the entropy of each cell's prediction, in nats: [B, C]."""
    positive, negative = negative_log(logits, epsilon), negative_log(-logits, epsilon)
    return torch.sigmoid(logits) * positive + torch.sigmoid(-logits) * negative


def entropy_maximisation(logits: Tensor, observed: Tensor, *, weight: float, epsilon: float = 0.0) -> Tensor:
    """Return cross-entropy on known cells, and ``-weight`` times the entropy on unknown ones (EM).

    Args:
        logits: [B, C], any float dtype.
        observed: [B, C]; a known negative pays cross-entropy (the source has none).
        weight: alpha; 0.2, 0.1, 0.1, 0.01 on VOC, COCO, NUS, CUB.
        epsilon: as in :func:`~scinet.losses.assumed.negative_log`.

    Source: Zhou et al., "Acknowledging the Unknown for Multi-label Learning with Single Positive Labels", ECCV 2022.
    """
    known = negative_log(logits * observed.sign(), epsilon)
    return torch.where(observed == 0, -weight * entropy(logits, epsilon), known)


def soft_negatives(logits: Tensor, targets: Tensor, *, weight: float, epsilon: float = 0.0) -> Tensor:
    """Return ``weight`` times cross-entropy towards soft targets (the negatives of APL): [B, C].

    Args:
        logits: [B, C].
        targets: [B, C] in [0, 1], a cell's own probability when it was chosen.
        weight: beta; 0.02, 0.9, 0.2, 0.4 on VOC, COCO, NUS, CUB.
        epsilon: as in :func:`~scinet.losses.assumed.negative_log`.

    Source: as :func:`entropy_maximisation`.
    """
    return weight * (targets * negative_log(logits, epsilon) + (1 - targets) * negative_log(-logits, epsilon))
