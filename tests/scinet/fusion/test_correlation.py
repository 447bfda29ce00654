"""The streamed label correlation: what counts mean, what is shrunk, and that R can be factorised."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from scinet.fusion.correlation import LabelCorrelation
from scinet.options import CorrelationOptions, CorrelationSource


def _correlation(
    num_classes: int,
    *,
    samples: int = 10**9,
    needs_confidence: bool = False,
    text: Tensor | None = None,
    **options: object,
) -> LabelCorrelation:
    text = torch.eye(num_classes) if text is None else text
    chosen = CorrelationOptions(**options)  # type: ignore[arg-type]
    return LabelCorrelation(text, chosen, samples_per_epoch=samples, needs_confidence=needs_confidence)


def _observed(num_rows: int, num_classes: int, seed: int = 0, unknown: float = 0.4) -> Tensor:
    """Correlated labels with holes."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(num_rows, 1, generator=generator)
    signs = torch.where(shared + torch.randn(num_rows, num_classes, generator=generator) > 0.5, 1, -1)
    return torch.where(torch.rand(num_rows, num_classes, generator=generator) < unknown, 0, signs).to(torch.int8)


def _pairwise(values: Tensor, weights: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weighted pairwise-complete Pearson correlation and pair counts, by loops."""
    x, w = values.double().numpy(), weights.double().numpy()
    size = x.shape[1]
    rho, count = np.zeros((size, size)), np.zeros((size, size))
    for a in range(size):
        for b in range(size):
            pair = w[:, a] * w[:, b]
            count[a, b] = pair.sum()
            if count[a, b] < 2:
                continue
            mean_a, mean_b = (pair * x[:, a]).sum() / count[a, b], (pair * x[:, b]).sum() / count[a, b]
            za, zb = x[:, a] - mean_a, x[:, b] - mean_b
            spread = np.sqrt((pair * za**2).sum() * (pair * zb**2).sum())
            rho[a, b] = (pair * za * zb).sum() / spread if spread > 1e-9 else 0.0
    return rho, count


def test_known_correlation_is_the_shrunk_pairwise_one_when_it_is_well_conditioned() -> None:
    observed = _observed(300, 5)
    tested = _correlation(5)
    for part in torch.split(observed, 70):
        tested.update(part, None)
    rho, count = _pairwise((observed > 0).float(), (observed != 0).float())
    expected = rho * count / (count + 30)
    np.fill_diagonal(expected, 1.0)
    assert np.linalg.eigvalsh(expected).min() > 0.02
    np.testing.assert_allclose(tested.known_correlation(30.0).numpy(), expected, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(num_rows=st.integers(0, 30), num_classes=st.integers(1, 8), seed=st.integers(0, 99), shrinkage=st.floats(0, 50))
def test_known_correlation_is_positive_definite_when_the_labels_are_anything(
    num_rows: int, num_classes: int, seed: int, shrinkage: float
) -> None:
    tested, observed = _correlation(num_classes), _observed(num_rows, num_classes, seed, unknown=0.7)
    tested.update(observed, None)
    matrix = tested.known_correlation(shrinkage).double()
    rho, count = _pairwise((observed > 0).float(), (observed != 0).float())
    shrunk = rho * count / np.maximum(count + shrinkage, 1e-12)
    np.fill_diagonal(shrunk, 1.0)
    values, vectors = np.linalg.eigh(shrunk)  # a pairwise-complete matrix may have negative ones
    np.testing.assert_allclose(matrix.numpy(), vectors * np.maximum(values, 0.02) @ vectors.T, atol=1e-5)
    assert matrix.isfinite().all()
    torch.testing.assert_close(matrix, matrix.T, atol=1e-6, rtol=0)
    assert torch.linalg.eigvalsh(matrix).min() > 0.02 - 1e-5
    assert (matrix.diagonal() >= 1 - 1e-5).all()  # a floor on the eigenvalues only adds to it


def test_diagonal_is_one_when_a_class_was_never_observed() -> None:
    tested = _correlation(3)
    observed = _observed(50, 3)
    observed[:, 2] = 0
    tested.update(observed, None)
    matrix = tested.known_correlation(0.0)
    assert matrix[2].tolist() == pytest.approx([0, 0, 1], abs=1e-6)
    assert matrix.diagonal().tolist() == pytest.approx([1, 1, 1], abs=1e-6)


@pytest.mark.parametrize("memory_epochs", [0.5, 1.0, 3.0])
def test_counts_mean_samples_when_many_epochs_were_seen(memory_epochs: float) -> None:
    num_samples, batch = 200, 20
    tested = _correlation(2, samples=num_samples, memory_epochs=memory_epochs)
    rows = torch.tensor([[1, 1], [-1, -1]], dtype=torch.int8).repeat(batch // 2, 1)
    for _ in range(10 * num_samples // batch * 3):
        tested.update(rows, None)
    # the labels agree always, so R_ab = n / (n + shrinkage) tells n
    value = tested.known_correlation(100.0)[0, 1].item()
    count = 100 * value / (1 - value)
    memory = memory_epochs * num_samples
    assert count == pytest.approx(batch / (1 - math.exp(-batch / memory)), rel=1e-3)
    assert memory <= count <= memory + batch


def test_old_labels_are_forgotten_when_they_change() -> None:
    tested = _correlation(1, samples=50)
    tested.update(torch.ones(50, 1, dtype=torch.int8), None)
    assert tested.positive_rate().item() > 0.9
    for _ in range(8):
        tested.update(-torch.ones(50, 1, dtype=torch.int8), None)
    assert tested.positive_rate().item() < 0.05


def test_class_lacks_negatives_when_positives_of_it_alone_are_known() -> None:
    observed = torch.zeros(2000, 5, dtype=torch.int8)
    observed[:3, 0] = 1
    observed[:, 1] = torch.where(torch.arange(2000) == 7, -1, 1)  # one negative is enough
    observed[:, 2] = -1
    observed[:5, 3] = torch.tensor([1, -1, -1, 1, 1])
    tested = _correlation(5)
    assert not tested.lacks_negatives().any()
    tested.update(observed, None)
    assert tested.lacks_negatives().tolist() == [True, False, False, False, False]
    tested = _correlation(5)
    tested.update(observed.clamp_min(0), None)
    assert tested.lacks_negatives().all()  # those of which nothing is known, too


@pytest.mark.parametrize("batches", [(50, 50), (20, 70, 5)])
def test_share_is_of_the_samples_that_are_not_forgotten_when_nothing_more_is_known(batches: tuple[int, ...]) -> None:
    tested, rows, positives = _correlation(2, samples=50), 0.0, 0.0
    for number, size in enumerate(batches):
        observed = torch.zeros(size, 2, dtype=torch.int8)
        observed[: size // 2 if number == 0 else 0] = 1
        tested.update(observed, None)
        kept = math.exp(-size / 50)
        rows, positives = kept * rows + size, kept * positives + int((observed[:, 0] > 0).sum())
        assert tested.positive_share().tolist() == pytest.approx([positives / rows] * 2, rel=1e-5)


def test_rate_is_shrunk_to_the_overall_one_when_a_class_is_seldom_observed() -> None:
    # 8 of 100 positive in class a; 1 of 1 in class b; nothing in class c
    observed = torch.zeros(101, 3, dtype=torch.int8)
    observed[:100, 0] = torch.where(torch.arange(100) < 8, 1, -1)
    observed[100, 1] = 1
    tested = _correlation(3)
    tested.update(observed, None)
    overall = (9 + 0.5) / (101 + 1)
    expected = [(8 + overall) / 101, (1 + overall) / 2, overall]
    assert tested.positive_rate().tolist() == pytest.approx(expected, rel=1e-5)


def test_rate_is_one_half_when_nothing_was_observed() -> None:
    assert _correlation(3).positive_rate().tolist() == [0.5] * 3


@pytest.mark.parametrize("sign", [1, -1])
def test_rate_stays_inside_the_unit_interval_when_all_labels_agree(sign: int) -> None:
    tested = _correlation(2)
    tested.update(torch.full((100_000, 2), sign, dtype=torch.int8), None)
    rate = tested.positive_rate()
    assert ((rate >= 1e-3) & (rate <= 1 - 1e-3)).all()
    assert torch.isfinite(torch.logit(rate)).all()


@pytest.mark.parametrize("needs_confidence", [True, False])
def test_shrunk_correlation_equals_the_formula_when_labels_and_confidence_are_seen(*, needs_confidence: bool) -> None:
    observed, generator = _observed(60, 4), torch.Generator().manual_seed(1)
    confidence = torch.rand(60, 4, generator=generator)
    text = torch.corrcoef(torch.randn(4, 9, generator=generator))
    tested = _correlation(4, needs_confidence=needs_confidence, text=text, unknown_weight=0.25, shrinkage=40.0)
    for rows, soft in zip(torch.split(observed, 25), torch.split(confidence, 25), strict=True):
        tested.update(rows, soft)
    known = observed != 0
    if needs_confidence:
        values = torch.where(known, (observed > 0).float(), confidence)
        weights = torch.where(known, 1.0, 0.25)
    else:
        values, weights = (observed > 0).float(), known.float()
    rho, count = _pairwise(values, weights)
    expected = (count * rho + 40 * text.double().numpy()) / (count + 40)
    np.testing.assert_allclose(tested.shrunk().numpy(), expected, atol=1e-5)


def test_text_alone_counts_when_it_is_the_source() -> None:
    text = torch.tensor([[1.0, 0.3], [0.3, 1.0]])
    tested = _correlation(2, text=text, source=CorrelationSource.text)
    tested.update(_observed(50, 2), None)
    assert torch.equal(tested.shrunk(), text)


def test_text_alone_counts_when_nothing_was_observed() -> None:
    text = torch.tensor([[1.0, 0.3], [0.3, 1.0]])
    torch.testing.assert_close(_correlation(2, text=text).shrunk(), text)


def test_batches_can_be_cut_anywhere_when_nothing_is_forgotten() -> None:
    observed, (whole, parts) = _observed(90, 4), (_correlation(4), _correlation(4))
    whole.update(observed, None)
    for part in torch.split(observed, 13):
        parts.update(part, None)
    torch.testing.assert_close(whole.known_correlation(30.0), parts.known_correlation(30.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.positive_rate(), parts.positive_rate())


@pytest.mark.parametrize("needs_confidence", [True, False])
def test_correlation_goes_on_equally_when_its_state_was_saved(*, needs_confidence: bool) -> None:
    first, second = (
        _correlation(3, samples=50, needs_confidence=needs_confidence, text=torch.full((3, 3), share).fill_diagonal_(1))
        for share in (0.3, -0.2)  # the prior is part of the state: another processor's text tower gives other digits
    )
    confidence = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    first.update(_observed(40, 3), confidence)
    second.update(_observed(25, 3, seed=8), confidence[:25])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for tested in (first, second):
        tested.update(_observed(40, 3, seed=2), confidence)
    assert torch.equal(first.known_correlation(9.0), second.known_correlation(9.0))
    assert torch.equal(first.positive_rate(), second.positive_rate())
    assert torch.equal(first.positive_share(), second.positive_share())
    assert torch.equal(first.shrunk(), second.shrunk())
