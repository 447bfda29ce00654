"""The expected positive regulariser: value and gradient are the global batch's, whatever its parts."""

from __future__ import annotations

import pytest
import torch

from scinet.losses.expectation import expected_positives


def test_regulariser_is_the_square_of_the_excess_over_the_classes() -> None:
    logits = torch.zeros(3, 4, dtype=torch.float64)  # two positives an image
    assert expected_positives(logits, expected=1.5).tolist() == pytest.approx([0.5**2 / 4] * 3)


@pytest.mark.parametrize("cut", [1, 3])
def test_gradient_is_the_whole_batchs_when_it_is_cut_in_parts(cut: int) -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    mean = torch.sigmoid(logits).sum(1).mean()
    (wanted,) = torch.autograd.grad(5 * (mean - 1.2) ** 2 / 4, logits)
    parts = sum(expected_positives(rows, expected=1.2, mean=mean.detach()).sum() for rows in logits.split(cut))
    (gradient,) = torch.autograd.grad(parts, logits)
    torch.testing.assert_close(gradient, wanted)
