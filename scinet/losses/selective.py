"""The class-aware selective loss: asymmetric, with unknown cells that are likely positives left out.

Shapes: B batch, G global batch, C classes; observed is +1, -1, 0.

Source: Ben-Baruch et al., "Multi-label Classification with Partial Annotations using Class-aware Selective Loss",
CVPR 2022.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Focus(NamedTuple):
    """Exponents g of the focus on known positives, known negatives and unknown cells."""

    positive: float
    negative: float
    unknown: float


def least_likely_positive(probabilities: Tensor, observed: Tensor, count: int) -> Tensor:
    """Return the probability from which an unknown cell of the global batch is left out: [] fp.

    It is that of the ``count``-th most likely positive among all unknown cells; more than 1 where count is 0.

    Args:
        probabilities: [G, C].
        observed: [G, C].
        count: cells to leave out.
    """
    if count == 0:
        return probabilities.new_tensor(2.0)
    likely = torch.where(observed == 0, probabilities, -1.0).flatten()
    return likely.topk(min(count, len(likely))).values[-1].clamp_min(0)


def is_selected(probabilities: Tensor, observed: Tensor, least: Tensor, *, common: Tensor | None) -> Tensor:
    """Return which cells are trained on: all known ones, and unknown ones that are hardly positives: [B, C] bool.

    Args:
        probabilities: [B, C].
        observed: [B, C].
        least: of :func:`least_likely_positive`.
        common: [C] bool, classes so frequent that no unknown cell of theirs is taken for a negative; None: none.
    """
    left_out = probabilities >= least
    if common is not None:
        left_out = left_out | common
    return (observed != 0) | ~left_out


def partial_asymmetric(logits: Tensor, observed: Tensor, selected: Tensor, *, focus: Focus) -> Tensor:
    """Return the loss of every cell (P-ASL): cross-entropy times a focus without gradient, [B, C].

    Args:
        logits: [B, C], any float dtype.
        observed: [B, C].
        selected: [B, C] bool, cells that count.
        focus: exponents; 0, 1, 4 for random masks and 0, 3, 4 for a fixed number a class in the source.
    """
    miss = torch.sigmoid(torch.where(observed > 0, -logits, logits)).detach()
    of_unknown = logits.new_tensor(focus.unknown)
    exponent = torch.where(observed > 0, focus.positive, torch.where(observed < 0, focus.negative, of_unknown))
    cells = torch.pow(miss, exponent) * functional.softplus(torch.where(observed > 0, -logits, logits))
    return torch.where(selected, cells, 0.0)
