"""Every loss of a cell against its formula, written for one number; and gradients where logits are extreme."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scinet.losses.assumed import assume_negative, known_cells, negative_log
from scinet.losses.asymmetric import asymmetric
from scinet.losses.entropy import entropy_maximisation, soft_negatives
from scinet.losses.expectation import towards_estimates
from scinet.losses.generalised import Robustness, generalised_robust
from scinet.losses.large_loss import large_loss
from scinet.losses.robust import hill, self_paced
from scinet.losses.selective import Focus, partial_asymmetric

ROBUSTNESS = Robustness(slope=4.0, offset=-3.0, centre=0.6, width=0.8)


def _p(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _positive(x: float) -> float:
    return -math.log(_p(x))


def _negative(x: float) -> float:
    return -math.log(1 - _p(x))


def _smoothed(x: float, z: int) -> float:
    one, other = (_positive(x), _negative(x)) if z > 0 else (_negative(x), _positive(x))
    return (0.9 * one + 0.1 * other) * (0.25 if z == 0 else 1)


def _entropy(x: float, z: int) -> float:
    if z:
        return _positive(x) if z > 0 else _negative(x)
    return -0.2 * (_p(x) * _positive(x) + (1 - _p(x)) * _negative(x))


def _asymmetric(x: float, z: int, unknown: float | None) -> float:
    if z > 0:
        return (1 - _p(x)) ** 1.5 * _positive(x)
    if z == 0 and unknown is None:
        return 0.0
    shifted = max(_p(x) - 0.1, 0)
    return -(shifted ** (3.0 if z < 0 else float(unknown or 0))) * math.log(1 - shifted)


def _self_paced(x: float, z: int, corrects: bool) -> float:
    if z > 0:
        return (1 - _p(x - 1)) ** 2 * _positive(x - 1)
    if corrects and z == 0 and _p(x) > 0.6:
        return (1 - _p(x)) ** 2 * _positive(x)
    return _p(x) ** 2 * _negative(x)


def _generalised(x: float, z: int) -> float:
    if z:
        return _positive(x) if z > 0 else _negative(x)
    p = _p(x)
    belief = _p(ROBUSTNESS.slope * p + ROBUSTNESS.offset)
    weight = math.exp(-((p - ROBUSTNESS.centre) ** 2) / (2 * ROBUSTNESS.width**2))
    return weight * (belief * (1 - p**0.3) / 0.3 + (1 - belief) * (1 - (1 - p) ** 0.7) / 0.7)


def _selective(x: float, z: int) -> float:
    return (1 - _p(x)) ** 0.5 * _positive(x) if z > 0 else _p(x) ** (1.0 if z < 0 else 4.0) * _negative(x)


Cells = Callable[[Tensor, Tensor], Tensor]
Formula = Callable[[float, int], float]


def _asl(logits: Tensor, observed: Tensor, *, gamma_unknown: float | None) -> Tensor:
    return asymmetric(logits, observed, gamma_positive=1.5, gamma_negative=3.0, margin=0.1, gamma_unknown=gamma_unknown)


def _of_estimates(logits: Tensor, observed: Tensor) -> Tensor:
    return towards_estimates(logits, torch.full_like(logits, 0.3), observed)


def _all_selected(logits: Tensor, observed: Tensor) -> Tensor:
    return partial_asymmetric(logits, observed, torch.ones_like(observed).bool(), focus=Focus(0.5, 1.0, 4.0))


def _rejecting(logits: Tensor, observed: Tensor, *, corrects: bool) -> Tensor:
    return large_loss(logits, observed, (observed == 0) & (logits > 1), corrects=corrects)


LOSSES: dict[str, tuple[Cells, Formula]] = {
    "bce": (known_cells, lambda x, z: 0.0 if z == 0 else (_positive(x) if z > 0 else _negative(x))),
    "an": (assume_negative, lambda x, z: _positive(x) if z > 0 else _negative(x)),
    "an_ls, wan": (partial(assume_negative, smoothing=0.1, unknown_weight=0.25), _smoothed),
    "em": (partial(entropy_maximisation, weight=0.2), _entropy),
    "apl": (
        lambda logits, observed: soft_negatives(logits, torch.full_like(logits, 0.2), weight=0.4),
        lambda x, z: 0.4 * (0.2 * _positive(x) + 0.8 * _negative(x)),
    ),
    "role": (
        _of_estimates,
        lambda x, z: (
            (0.3 * _positive(x) + 0.7 * _negative(x) + (0 if z == 0 else _positive(x) if z > 0 else _negative(x))) / 2
        ),
    ),
    "ll_r": (
        partial(_rejecting, corrects=False),
        lambda x, z: 0.0 if z == 0 and x > 1 else (_positive(x) if z > 0 else _negative(x)),
    ),
    "ll_ct": (
        partial(_rejecting, corrects=True),
        lambda x, z: _positive(x) if z > 0 or (z == 0 and x > 1) else _negative(x),
    ),
    "asl": (partial(_asl, gamma_unknown=2.0), lambda x, z: _asymmetric(x, z, 2.0)),
    "asl, unknown left out": (partial(_asl, gamma_unknown=None), lambda x, z: _asymmetric(x, z, None)),
    "hill": (
        partial(hill, ceiling=1.5, margin=1.0, gamma=2.0),
        lambda x, z: (1 - _p(x - 1)) ** 2 * _positive(x - 1) if z > 0 else (1.5 - _p(x)) * _p(x) ** 2,
    ),
    "splc, first epoch": (
        partial(self_paced, threshold=0.6, margin=1.0, gamma=2.0, corrects=False),
        lambda x, z: _self_paced(x, z, False),
    ),
    "splc": (
        partial(self_paced, threshold=0.6, margin=1.0, gamma=2.0, corrects=True),
        lambda x, z: _self_paced(x, z, True),
    ),
    "gr": (partial(generalised_robust, robustness=ROBUSTNESS, positive_power=0.3, negative_power=0.7), _generalised),
    "p_asl": (_all_selected, _selective),
}


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None, max_examples=40)
@given(cells=st.lists(st.tuples(st.floats(-12, 12), st.sampled_from((-1, 0, 1))), min_size=1, max_size=6))
def test_loss_of_a_cell_is_its_formula(name: str, cells: list[tuple[float, int]]) -> None:
    loss, formula = LOSSES[name]
    logits = torch.tensor([[x for x, _ in cells]], dtype=torch.float64)
    observed = torch.tensor([[z for _, z in cells]], dtype=torch.int8)
    expected = [formula(x, z) for x, z in cells]
    assert loss(logits, observed)[0].tolist() == pytest.approx(expected, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_finite_when_logits_are_extreme(name: str) -> None:
    logits = torch.tensor([[-200.0, -60.0, 0.0, 60.0, 200.0]]).repeat(3, 1).requires_grad_()
    observed = torch.tensor([[-1], [0], [1]], dtype=torch.int8).expand(3, 5)
    total = LOSSES[name][0](logits, observed).sum()
    (gradient,) = torch.autograd.grad(total, logits)
    assert total.isfinite()
    assert gradient.isfinite().all()
    assert total.dtype is torch.float32


DETACHED = ("gr", "p_asl")


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in DETACHED])
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(4, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    observed = torch.randint(-1, 2, (4, 3), generator=generator).to(torch.int8)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name][0](x, observed), logits)


def test_known_negative_always_pays_when_the_model_is_wrong() -> None:
    logits = torch.full((1, 1), 3.0)
    observed = torch.full((1, 1), -1, dtype=torch.int8)
    for name, (loss, _) in LOSSES.items():
        assert loss(logits, observed).item() > 0.1, name


def test_epsilon_is_added_to_the_probability() -> None:
    assert negative_log(torch.tensor(0.0), 0.25).item() == pytest.approx(-math.log(0.75))


@given(x=st.floats(-8, 8), target=st.floats(0, 1))
def test_epsilon_of_the_authors_code_reaches_every_logarithm(x: float, target: float) -> None:
    epsilon, p = 0.01, _p(x)
    positive, negative = -math.log(p + epsilon), -math.log(1 - p + epsilon)
    mixed = target * positive + (1 - target) * negative
    logits, targets = torch.tensor([[x, x]], dtype=torch.float64), torch.full((1, 2), target, dtype=torch.float64)
    observed = torch.tensor([[1, 0]], dtype=torch.int8)
    robust = generalised_robust(
        logits, observed, robustness=ROBUSTNESS, positive_power=0.5, negative_power=1.5, epsilon=epsilon
    )
    found = {
        "assumed": assume_negative(logits, observed, epsilon=epsilon)[0].tolist(),
        "entropy": entropy_maximisation(logits, observed, weight=0.2, epsilon=epsilon)[0].tolist(),
        "soft": soft_negatives(logits, targets, weight=0.4, epsilon=epsilon)[0, :1].tolist(),
        "estimates": towards_estimates(logits, targets, observed, epsilon=epsilon)[0].tolist(),
        "robust": robust[0, :1].tolist(),
    }
    wanted = {
        "assumed": [positive, negative],
        "entropy": [positive, -0.2 * (p * positive + (1 - p) * negative)],
        "soft": [0.4 * mixed],
        "estimates": [(positive + mixed) / 2, mixed / 2],
        "robust": [positive],
    }
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, abs=1e-9), name
