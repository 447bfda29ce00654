"""The losses against plain loops; their gradients against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scinet.losses.supervised import binary_cross_entropy, focal_margin

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _focal(gamma: float, margin: float) -> Loss:
    return lambda z, y, w: focal_margin(z, y, w, gamma=gamma, margin=margin)


LOSSES = [binary_cross_entropy, *(_focal(gamma, margin) for gamma in (0.0, 0.5, 1.0, 2.0) for margin in (0.0, 1.0))]


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def _cells(size: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(size, 5, generator=generator, dtype=dtype)
    return (
        logits,
        torch.rand(size, 5, generator=generator, dtype=dtype),
        torch.rand(size, 5, generator=generator, dtype=dtype),
    )


@settings(deadline=None, max_examples=25)
@given(size=st.integers(0, 7), seed=st.integers(0, 99), gamma=st.floats(0, 4), margin=st.floats(0, 3))
def test_focal_margin_equals_the_plain_loop_when_targets_are_soft(
    size: int, seed: int, gamma: float, margin: float
) -> None:
    logits, targets, weights = _cells(size, seed)
    expected = 0.0
    for z, y, w in zip(*(x.flatten().tolist() for x in (logits, targets, weights)), strict=True):
        q, p = _sigmoid(z - margin), _sigmoid(z)
        expected += w * (y * -((1 - q) ** gamma) * math.log(q) + (1 - y) * -(p**gamma) * math.log(1 - p))
    assert focal_margin(logits, targets, weights, gamma=gamma, margin=margin).item() == pytest.approx(
        expected, rel=1e-9
    )


@settings(deadline=None, max_examples=25)
@given(size=st.integers(0, 7), seed=st.integers(0, 99))
def test_cross_entropy_equals_the_plain_loop_when_targets_are_soft(size: int, seed: int) -> None:
    logits, targets, weights = _cells(size, seed)
    expected = 0.0
    for z, y, w in zip(*(x.flatten().tolist() for x in (logits, targets, weights)), strict=True):
        expected -= w * (y * math.log(_sigmoid(z)) + (1 - y) * math.log(_sigmoid(-z)))
    assert binary_cross_entropy(logits, targets, weights).item() == pytest.approx(expected, rel=1e-9)


def test_focal_margin_is_cross_entropy_when_gamma_and_margin_are_zero() -> None:
    cells = _cells(6, 0)
    torch.testing.assert_close(focal_margin(*cells, gamma=0.0, margin=0.0), binary_cross_entropy(*cells))


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_equals_finite_differences(loss: Loss) -> None:
    logits, targets, weights = _cells(3, 1)
    assert torch.autograd.gradcheck(
        lambda z, y: loss(z, y, weights), (logits.requires_grad_(), targets.requires_grad_())
    )


@pytest.mark.parametrize("target", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("logit", [-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_are_finite_when_logits_are_extreme(loss: Loss, logit: float, target: float) -> None:
    logits = torch.full((1, 1), logit, requires_grad=True)
    value = loss(logits, torch.full((1, 1), target), torch.ones(1, 1))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite()
    assert value >= 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_cell_is_removed_when_its_weight_is_zero(loss: Loss) -> None:
    logits, targets, weights = _cells(4, 2)
    weights[1, 2] = 0
    logits.requires_grad_()
    value = loss(logits, targets, weights)
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient[1, 2] == 0
    changed = logits.detach().clone()
    changed[1, 2] = 50.0
    torch.testing.assert_close(loss(changed, targets, weights), value.detach())


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_of_a_batch_is_the_sum_of_its_parts_when_split(loss: Loss) -> None:
    cells = _cells(6, 3)
    parts = [loss(*rows) for rows in zip(*(torch.split(x, 2) for x in cells), strict=True)]
    torch.testing.assert_close(loss(*cells), torch.stack(parts).sum())


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_zero_when_the_batch_is_empty(loss: Loss) -> None:
    assert loss(*(torch.zeros(0, 5) for _ in range(3))).item() == 0
