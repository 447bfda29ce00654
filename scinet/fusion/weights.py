"""The weights of the fusion, fitted: one logistic regression over the terms, shared by all classes.

Method.md section 3.3: ``logit Q = w_0 logit P + w_N N + w_L L + w_R R + b``, on cells whose label is known and was not
trained on, with a prior that pulls to (1, 0, 0, 0, 0). No term may count against what it says: one that would get a
negative weight has weight 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scinet.fusion.evidence import Evidence

TERMS = ("teacher", "instance", "label", "region", "bias")
PRIOR = (1.0, 0.0, 0.0, 0.0, 0.0)

_PRECISION = (1.0, 0.01, 1.0, 0.01, 1.0)
_EVIDENCE = (1, 2, 3)
_LEAST_CELLS = 3
_NEWTON_STEPS = 50
_CONVERGED = 1e-10
_LOGIT_RANGE = 1e-4


def features(probabilities: Tensor, evidence: Evidence) -> Tensor:
    """Return what the regression sees of cells, a term that is None as 0: [B, C, 5] float64."""
    teacher = torch.logit(probabilities.double().clamp(_LOGIT_RANGE, 1 - _LOGIT_RANGE))
    shifts = [torch.zeros_like(teacher) if term is None else term.double() for term in evidence]
    return torch.stack([teacher, *shifts, torch.ones_like(teacher)], -1)


def fit(cells: Tensor, labels: Tensor) -> Tensor | None:
    """Return the weights, in the order of ``TERMS``: [5] float64.

    The posterior mode under a Gaussian prior, by Newton's method; a column that is 0 everywhere keeps its prior.

    Args:
        cells: [N, 5] float64, as :func:`features` gives them.
        labels: [N] bool.

    Returns:
        None where fewer than three cells are positive, or negative: nothing can be fitted.
    """
    positives = int(labels.sum())
    if min(positives, len(labels) - positives) < _LEAST_CELLS:
        return None
    free = [*range(len(TERMS))]
    while True:
        weights = _posterior_mode(cells, labels.double(), free)
        negative = [term for term in _EVIDENCE if weights[term] < 0]
        if not negative:
            return weights
        free.remove(min(negative, key=lambda term: float(weights[term])))


def _posterior_mode(cells: Tensor, labels: Tensor, free: list[int]) -> Tensor:
    prior = cells.new_tensor(PRIOR)
    precision = cells.new_tensor(_PRECISION)

    def loss(weights: Tensor) -> Tensor:
        scores = cells @ weights
        misfit = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels, reduction="sum")
        return misfit + (precision * (weights - prior).square()).sum() / 2

    weights, chosen = prior.clone(), cells[:, free]
    for _ in range(_NEWTON_STEPS):
        predicted = torch.sigmoid(cells @ weights)
        gradient = chosen.T @ (predicted - labels) + (precision * (weights - prior))[free]
        curvature = (chosen * (predicted * (1 - predicted)).unsqueeze(1)).T @ chosen + precision[free].diag()
        step = torch.zeros_like(weights)
        step[free] = torch.linalg.solve(curvature, gradient)
        # far from the mode a whole step can overshoot
        before = loss(weights)
        while step.abs().max() > _CONVERGED and loss(weights - step) > before:
            step /= 2
        weights -= step
        if step.abs().max() <= _CONVERGED:
            break
    return weights


def log_loss(scores: Tensor, labels: Tensor) -> float:
    """Return the mean log-loss of log-odds [N] against labels [N]."""
    return float(torch.nn.functional.binary_cross_entropy_with_logits(scores, labels.double()))
