"""The regression against scikit-free truths: its optimum, what it recovers, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from scinet.fusion import weights
from scinet.fusion.evidence import Evidence

N = 4000


def _cells(seed: int = 0, size: int = N) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    terms = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return torch.cat([terms, torch.ones(size, 1, dtype=torch.float64)], 1)


def _labels(cells: torch.Tensor, true: tuple[float, ...], seed: int = 1) -> torch.Tensor:
    chance = torch.sigmoid(cells @ torch.tensor(true, dtype=torch.float64))
    return torch.rand(len(cells), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) < chance


def test_weights_are_those_that_made_the_labels() -> None:
    true = (1.3, 2.0, 0.5, 1.0, -0.7)
    cells = _cells(size=40_000)
    found = weights.fit(cells, _labels(cells, true))
    assert found is not None
    assert found.tolist() == pytest.approx(true, abs=0.08)


def test_gradient_of_the_posterior_is_zero_at_the_weights() -> None:
    cells = _cells()
    labels = _labels(cells, (0.8, 1.0, 1.0, 1.0, 0.2))
    found = weights.fit(cells, labels)
    assert found is not None
    free = found.clone().requires_grad_()
    prior = torch.tensor(weights.PRIOR, dtype=torch.float64)
    precision = torch.tensor([1.0, 0.01, 1.0, 0.01, 1.0], dtype=torch.float64)
    scores = cells @ free
    loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels.double(), reduction="sum")
    (loss + (precision * (free - prior).square()).sum() / 2).backward()
    assert free.grad is not None
    assert free.grad.abs().max() < 1e-6


def test_term_that_speaks_against_the_labels_has_weight_zero() -> None:
    cells = _cells()
    found = weights.fit(cells, _labels(cells, (1.0, -1.0, 0.5, 0.5, 0.0)))
    assert found is not None
    assert found[1] == 0
    assert (found[2:4] > 0).all()


def test_term_that_is_zero_everywhere_keeps_its_prior() -> None:
    cells = _cells()
    cells[:, 3] = 0
    found = weights.fit(cells, _labels(cells, (1.0, 0.5, 0.5, 9.0, 0.0)))
    assert found is not None
    assert found[3] == 0


def test_fit_converges_when_the_teacher_is_certain_and_wrong() -> None:
    cells = _cells()
    cells[:, 0] = torch.where(cells[:, 0] > 0, 9.2, -9.2)
    labels = cells[:, 1] + 0.3 * _cells(5)[:, 1] > 0
    found = weights.fit(cells, labels)
    assert found is not None
    assert weights.log_loss(cells @ found, labels) < 0.3


@pytest.mark.parametrize("positives", [0, 2, 18, 20])
def test_nothing_is_fitted_to_cells_of_one_kind(positives: int) -> None:
    labels = torch.arange(20) < positives
    assert weights.fit(_cells(size=20), labels) is None


def test_features_stand_in_the_order_of_the_terms() -> None:
    probabilities, shift = torch.tensor([[0.5, 1.0]]), torch.tensor([[1.0, 2.0]])
    cells = weights.features(probabilities, Evidence(shift, None, 3 * shift))
    assert cells.shape == (1, 2, len(weights.TERMS))
    assert cells[0, 0].tolist() == pytest.approx([0.0, 1.0, 0.0, 3.0, 1.0])
    assert cells[0, 1, 0] == pytest.approx(9.2102, abs=1e-3)
