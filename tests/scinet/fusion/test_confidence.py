"""The unified confidence against the formulas of method.md section 3, written as loops in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from scinet.errors import ConfigError
from scinet.fusion.bank import Neighbours, plain_rows
from scinet.fusion.confidence import Confidence, Fusion, conditional_expectation
from scinet.options import Bandwidth, Combine, CorrelationOptions, CorrelationSource, FusionOptions, Memory, Weights
from scinet_kernels import pearson

C, D, N = 4, 6, 1000
TEXT = torch.corrcoef(torch.randn(C, 9, generator=torch.Generator().manual_seed(3)))
EVIDENCE: dict[str, Any] = {"combine": Combine.evidence}
POOL: dict[str, Any] = {"combine": Combine.pool}
LINEAR: dict[str, Any] = {"combine": Combine.linear, "instance_weight": 0.1, "label_weight": 0.4}


def _fusion(
    *, correlation: CorrelationOptions | None = None, num_samples: int = N, text: Tensor = TEXT, **options: Any
) -> Fusion:
    without_memory = {"momentum": 0.0, "memory": Memory.none}
    options = {"weights": Weights.fixed, "bank_size": 64, "bandwidth_value": 0.7} | without_memory | EVIDENCE | options
    return Fusion(
        FusionOptions(**options),
        correlation or CorrelationOptions(),
        text,
        width=D,
        num_samples=num_samples,
        samples_per_epoch=10**9,
    )


def _rows(size: int, seed: int, start: int = 0, num_classes: int = C) -> Neighbours:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.nn.functional.normalize(torch.randn(size, D, generator=generator), dim=1)
    observed = torch.randint(-1, 2, (size, num_classes), generator=generator).to(torch.int8)
    confidence = torch.rand(size, num_classes, generator=generator)
    return plain_rows(embeddings, observed, confidence, torch.arange(start, start + size))


def _probabilities(size: int, seed: int = 0, num_classes: int = C) -> Tensor:
    return 0.05 + 0.9 * torch.rand(size, num_classes, generator=torch.Generator().manual_seed(100 + seed))


def _joined(*parts: Neighbours) -> Neighbours:
    return Neighbours(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _weights(batch: Neighbours, rows: Neighbours, sigma: float, radius: float = math.inf) -> NDArray[np.float64]:
    """S~ [B, M]: row-normalised Gaussian similarity to rows of other samples within the radius; 0 without any."""
    queries, keys = batch[0].double().numpy(), rows[0].double().numpy()
    similarity = np.zeros((len(queries), len(keys)))
    for i, mine in enumerate(batch[3].tolist()):
        for j, theirs in enumerate(rows[3].tolist()):
            distance = np.linalg.norm(queries[i] - keys[j])
            if mine != theirs and distance <= radius:
                similarity[i, j] = math.exp(-(distance**2) / (2 * sigma**2))
    total = similarity.sum(1, keepdims=True)
    return similarity / np.where(total > 0, total, 1)


def _overridden(raw: NDArray[np.float64], observed: Tensor) -> NDArray[np.float64]:
    known = observed.numpy()
    return np.where(known == 0, raw, known > 0)


def _logit(p: NDArray[np.float64]) -> NDArray[np.float64]:
    p = np.clip(p, 1e-3, 1 - 1e-3)
    return np.log(p / (1 - p))


def _expected_label(
    correlation: NDArray[np.float64], rate: NDArray[np.float64], observed: Tensor, noise: float
) -> NDArray[np.float64]:
    """L_i = pi + s R (R + V_i)^-1 z_i with V = 1e4 on unknown cells."""
    spread = np.sqrt(rate * (1 - rate))
    rows = []
    for known in observed.numpy():
        z = np.where(known != 0, ((known > 0) - rate) / spread, 0.0)
        variance = np.diag(np.where(known != 0, noise, 1e4))
        rows.append(rate + spread * (correlation @ np.linalg.solve(correlation + variance, z)))
    return np.clip(np.array(rows), 0.002, 0.998)


@settings(deadline=None, max_examples=25)
@given(num_classes=st.integers(1, 12), seed=st.integers(0, 99), noise=st.floats(0.01, 2))
def test_conditional_expectation_equals_the_dense_formula(num_classes: int, seed: int, noise: float) -> None:
    generator = np.random.default_rng(seed)
    factor = generator.normal(size=(num_classes, num_classes + 2))
    correlation = np.corrcoef(factor).reshape(num_classes, num_classes) * 0.9 + 0.1 * np.eye(num_classes)
    rate = generator.uniform(0.02, 0.9, num_classes)
    observed = torch.from_numpy(generator.choice([-1, 0, 0, 1], (9, num_classes)).astype(np.int8))
    got = conditional_expectation(
        torch.from_numpy(correlation).float(), torch.from_numpy(rate).float(), observed, noise=noise
    )
    np.testing.assert_allclose(got.numpy(), _expected_label(correlation, rate, observed, noise), atol=2e-4)


@pytest.mark.parametrize("rate", [0.001, 0.0015, 0.3, 0.9985, 0.999])
def test_conditional_expectation_is_the_rate_when_nothing_is_known(rate: float) -> None:
    rates = torch.tensor([rate, 0.5])
    got = conditional_expectation(torch.eye(2), rates, torch.zeros(3, 2, dtype=torch.int8), noise=0.3)
    assert torch.equal(got, rates.expand(3, 2))


def test_conditional_expectation_follows_the_sign_of_the_correlation_when_a_label_is_known() -> None:
    correlation = torch.tensor([[1.0, 0.6, -0.6], [0.6, 1.0, 0.0], [-0.6, 0.0, 1.0]])
    rate = torch.tensor([0.3, 0.3, 0.3])
    positive, negative = conditional_expectation(
        correlation, rate, torch.tensor([[1, 0, 0], [-1, 0, 0]], dtype=torch.int8), noise=0.3
    )
    assert positive[1] > 0.3 > positive[2]
    assert negative[1] < 0.3 < negative[2]


@pytest.mark.parametrize(
    "options", [EVIDENCE, POOL, LINEAR, {"enabled": False}, LINEAR | {"momentum": 0.5, "memory": Memory.dense}]
)
def test_known_cells_are_exact_when_combined(options: dict[str, Any]) -> None:
    fusion, everyone = _fusion(**options), _rows(12, 0)
    fusion.update(_rows(30, 1, start=100))
    unified = fusion.combine(everyone, _probabilities(12), everyone).unified
    observed = everyone[1]
    assert (unified[observed > 0] == 1).all()
    assert (unified[observed < 0] == 0).all()
    unknown = unified[observed == 0]
    assert ((unknown > 0) & (unknown < 1)).all()


def test_probabilities_come_back_when_fusion_is_disabled() -> None:
    fusion, everyone, probabilities = _fusion(enabled=False), _rows(12, 0), _probabilities(12)
    confidence = fusion.combine(everyone, probabilities, everyone)
    assert confidence.instance is None
    assert confidence.label is None
    assert torch.equal(confidence.unified, torch.where(everyone[1] == 0, probabilities, (everyone[1] > 0).float()))


@pytest.mark.parametrize("bandwidth", list(Bandwidth))
@pytest.mark.parametrize("density", [0.5, 0.0005])
@pytest.mark.parametrize("combine", [Combine.evidence, Combine.pool])
def test_probabilities_come_back_when_there_is_no_evidence(
    bandwidth: Bandwidth, density: float, combine: Combine
) -> None:
    fusion = _fusion(bandwidth=bandwidth, bank_size=0, combine=combine)
    generator = torch.Generator().manual_seed(0)
    past = _rows(4000, 1, start=100)
    drawn = torch.where(torch.rand(4000, C, generator=generator) < density, 1, -1).to(torch.int8)
    fusion.update(past._replace(observed=drawn))  # rates are known, rare ones too, but no neighbour is kept
    alone = _rows(1, 0)
    alone = alone._replace(observed=torch.zeros(1, C, dtype=torch.int8))
    probabilities = _probabilities(1)
    unified = fusion.combine(alone, probabilities, alone).unified
    torch.testing.assert_close(unified, probabilities, atol=1e-5, rtol=0)


@pytest.mark.parametrize("radius", [2.0, 1.5])
@pytest.mark.parametrize("with_bank", [True, False])
@pytest.mark.parametrize("combine", [Combine.evidence, Combine.pool])
def test_log_odds_equal_the_loops_when_combined(combine: Combine, radius: float, *, with_bank: bool) -> None:
    options: dict[str, Any] = {
        "combine": combine,
        "instance_weight": 0.8,
        "label_weight": 1.3,
        "prior_strength": 0.07,
        "label_noise": 0.45,
        "label_shrinkage": 17.0,
    }
    fusion = _fusion(radius=radius, bank_size=64 if with_bank else 0, **options)
    past, everyone, probabilities = _rows(20, 1, start=5), _rows(12, 0), _probabilities(12)  # 7 samples are in both
    fusion.update(past)
    batch = Neighbours(*(column[3:9] for column in everyone))
    confidence = fusion.combine(batch, probabilities[3:9], everyone)

    rate = fusion.correlation.positive_rate().double().numpy()
    rows = _joined(everyone, past) if with_bank else everyone
    weights = _weights(batch, rows, 0.7, radius)
    known, positive = (rows[1] != 0).double().numpy(), (rows[1] > 0).double().numpy()
    votes = (weights @ positive + 0.07 * rate) / (weights @ known + 0.07)
    correlation = fusion.correlation.known_correlation(17.0).double().numpy()
    expectation = _expected_label(correlation, rate, batch[1], 0.45)
    score = _logit(probabilities[3:9].double().numpy())
    if combine is Combine.pool:
        say = 0.8 * (weights @ known) / (weights @ known + 0.07)
        score = (score + say * _logit(votes)) / (1 + say)
    else:
        score += 0.8 * (_logit(votes) - _logit(rate))
    score += 1.3 * (_logit(expectation) - _logit(rate))
    assert confidence.instance is not None
    assert confidence.label is not None
    np.testing.assert_allclose(confidence.instance.numpy(), votes, atol=1e-4)
    np.testing.assert_allclose(confidence.label.numpy(), expectation, atol=1e-4)
    np.testing.assert_allclose(confidence.unified.numpy(), _overridden(1 / (1 + np.exp(-score)), batch[1]), atol=1e-3)


@pytest.mark.parametrize("weight", ["instance_weight", "label_weight"])
def test_part_is_none_when_its_weight_is_zero(weight: str) -> None:
    fusion, everyone = _fusion(**dict[str, Any]({weight: 0.0})), _rows(8, 0)
    confidence = fusion.combine(everyone, _probabilities(8), everyone)
    assert (confidence.instance is None) == (weight == "instance_weight")
    assert (confidence.label is None) == (weight == "label_weight")


def _propagation(correlation: NDArray[np.float64], top_k: int, temperature: float) -> NDArray[np.float64]:
    size = len(correlation)
    result = np.zeros((size, size))
    for a in range(size):
        row = [max(correlation[a, b], 0.0) if a != b else 0.0 for b in range(size)]
        kept = sorted(range(size), key=lambda b: -row[b])[:top_k]
        row = [value if b in kept else 0.0 for b, value in enumerate(row)]
        total = sum(row)
        graph = [0.2 * value / total if total else 0.0 for value in row]
        graph[a] = 0.8
        powers = [math.exp(value / temperature) if value else 0.0 for value in graph]
        result[a] = np.array(powers) / sum(powers)
    return result


@pytest.mark.parametrize("radius", [2.0, 0.9])
def test_linear_equals_the_loops_when_combined(radius: float) -> None:
    correlation = CorrelationOptions(source=CorrelationSource.text, graph_top_k=2, temperature=0.3)
    fusion = _fusion(correlation=correlation, radius=radius, **LINEAR)
    past, everyone, probabilities = _rows(20, 1, start=5), _rows(12, 0), _probabilities(12)
    fusion.update(past)
    batch = Neighbours(*(column[3:9] for column in everyone))
    confidence = fusion.combine(batch, probabilities[3:9], everyone)

    rows, p = _joined(everyone, past), probabilities[3:9].double().numpy()
    weights = _weights(batch, rows, 0.7, radius)
    votes = np.where(weights.sum(1, keepdims=True) > 0, weights @ rows[2].double().numpy(), p)
    spread = p @ _propagation(TEXT.double().numpy(), 2, 0.3).T
    raw = (p + 0.1 * votes + 0.4 * spread) / 1.5
    assert confidence.instance is not None
    np.testing.assert_allclose(confidence.instance.numpy(), votes, atol=1e-4)
    np.testing.assert_allclose(confidence.unified.numpy(), _overridden(raw, batch[1]), atol=1e-4)


def test_linear_keeps_the_probabilities_when_both_weights_are_zero() -> None:
    fusion, everyone, probabilities = (
        _fusion(**(LINEAR | {"instance_weight": 0.0, "label_weight": 0.0})),
        _rows(8, 0),
        _probabilities(8),
    )
    unified = fusion.combine(everyone, probabilities, everyone).unified
    torch.testing.assert_close(unified[everyone[1] == 0], probabilities[everyone[1] == 0])


@pytest.mark.parametrize("where", ["batch", "bank"])
@pytest.mark.parametrize("sign", [1, -1])
def test_neighbour_moves_the_vote_when_its_label_is_known(where: str, sign: int) -> None:
    base = _rows(1, 0)
    base = base._replace(observed=torch.zeros(1, C, dtype=torch.int8))
    labels = torch.zeros(1, C, dtype=torch.int8)
    labels[0, 2] = sign
    other = plain_rows(base[0].clone(), labels, base[2], torch.tensor([7]))
    far = plain_rows(-base[0], -labels, base[2], torch.tensor([8]))
    fusion = _fusion()
    fusion.correlation.update(_rows(200, 5)[1], None)
    if where == "bank":
        fusion.bank.append(_joined(other, far))
    everyone = _joined(base, other, far) if where == "batch" else base
    confidence = fusion.combine(base, _probabilities(1), everyone)
    instance = confidence.instance
    rate = fusion.correlation.positive_rate()
    assert instance is not None
    assert sign * (instance[0, 2] - rate[2]) > 0.1
    assert sign * (confidence.unified[0, 2] - _probabilities(1)[0, 2]) > 0.05
    torch.testing.assert_close(instance[0, [0, 1, 3]], rate[[0, 1, 3]])


def test_own_row_does_not_vote_when_the_bank_holds_it() -> None:
    everyone = _rows(1, 0)
    everyone = everyone._replace(observed=-torch.ones(1, C, dtype=torch.int8))
    fusion = _fusion()
    fusion.update(everyone)
    instance = fusion.combine(everyone, _probabilities(1), everyone).instance
    assert instance is not None
    torch.testing.assert_close(instance[0], fusion.correlation.positive_rate())


@pytest.mark.parametrize(
    "options", [EVIDENCE, POOL, LINEAR, {"bandwidth": Bandwidth.adaptive}, {"bandwidth": Bandwidth.adaptive} | LINEAR]
)
@pytest.mark.parametrize("size", [1, 2, 13])
def test_everything_is_finite_when_no_cell_is_known(options: dict[str, Any], size: int) -> None:
    fusion, everyone = _fusion(**options), _rows(size, 0)
    everyone = everyone._replace(observed=torch.zeros(size, C, dtype=torch.int8))
    for _ in range(2):
        confidence = fusion.combine(everyone, _probabilities(size), everyone)
        assert all(part is None or part.isfinite().all() for part in confidence)
        assert ((confidence.unified >= 0) & (confidence.unified <= 1)).all()
        fusion.update(everyone._replace(confidence=confidence.unified))


@pytest.mark.parametrize("options", [EVIDENCE, POOL, LINEAR])
@pytest.mark.parametrize("sign", [1, -1])
def test_everything_is_finite_when_all_labels_agree_and_the_teacher_is_certain(
    options: dict[str, Any], sign: int
) -> None:
    fusion, everyone = _fusion(**options), _rows(6, 0)
    everyone = everyone._replace(observed=torch.full((6, C), sign, dtype=torch.int8))
    fusion.update(everyone)
    blank = everyone._replace(observed=torch.zeros(6, C, dtype=torch.int8))
    for value in (0.0, 1.0):
        unified = fusion.combine(blank, torch.full((6, C), value), blank).unified
        assert unified.isfinite().all()


@pytest.mark.parametrize("options", [EVIDENCE, POOL, LINEAR, {"bandwidth": Bandwidth.adaptive}])
def test_rows_are_equal_when_the_ranks_share_them(options: dict[str, Any]) -> None:
    fusion, everyone, probabilities = _fusion(**options), _rows(12, 0), _probabilities(12)
    fusion.update(_rows(20, 1, start=50))
    whole = fusion.combine(everyone, probabilities, everyone).unified
    for rank in range(3):
        part = Neighbours(*(column[rank::3] for column in everyone))
        mine = fusion.combine(part, probabilities[rank::3], everyone).unified
        torch.testing.assert_close(mine, whole[rank::3], atol=1e-5, rtol=0)


def test_combining_changes_no_state() -> None:
    fusion, everyone = _fusion(momentum=0.5, memory=Memory.dense), _rows(12, 0)
    fusion.update(_rows(20, 1, start=50))
    before = copy.deepcopy(fusion.state_dict())
    fusion.combine(everyone, _probabilities(12), everyone)
    after = fusion.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].nan_to_num(9), after[key].nan_to_num(9)) for key in before)


def test_previous_confidence_is_mixed_in_when_the_sample_was_seen_before() -> None:
    plain, tested = _fusion(**LINEAR), _fusion(**LINEAR, momentum=0.9, memory=Memory.dense)
    everyone, probabilities = _rows(8, 0), _probabilities(8)
    everyone = everyone._replace(observed=torch.zeros(8, C, dtype=torch.int8))
    raw = plain.combine(everyone, probabilities, everyone).unified
    torch.testing.assert_close(tested.combine(everyone, probabilities, everyone).unified, raw)  # first sight
    for fusion in (plain, tested):
        fusion.update(Neighbours(*(column[:5] for column in everyone)))
    raw = plain.combine(everyone, probabilities, everyone).unified
    mixed = tested.combine(everyone, probabilities, everyone).unified
    torch.testing.assert_close(mixed[:5], 0.9 * everyone[2][:5] + 0.1 * raw[:5])
    torch.testing.assert_close(mixed[5:], raw[5:])


def test_memory_is_refused_when_it_exceeds_its_budget() -> None:
    with pytest.raises(ConfigError) as caught:
        _fusion(memory=Memory.dense, memory_budget_mb=15, num_samples=2**20)
    message = str(caught.value)
    assert "needs 16 MiB for 1048576 samples x 4 classes" in message
    assert "fusion.memory_budget_mb=15" in message
    assert "fusion.memory=none" in message
    _fusion(memory=Memory.dense, memory_budget_mb=16, num_samples=2**20)
    _fusion(memory=Memory.none, memory_budget_mb=15, num_samples=2**20)
    _fusion(memory=Memory.dense, memory_budget_mb=15, num_samples=2**20, enabled=False)


@pytest.mark.parametrize(
    "options", [EVIDENCE, POOL, LINEAR, LINEAR | {"momentum": 0.5, "memory": Memory.dense}, {"enabled": False}]
)
def test_fusion_goes_on_equally_when_its_state_was_saved(options: dict[str, Any]) -> None:
    first, second = _fusion(**options), _fusion(**options)
    first.update(_rows(20, 1))
    second.update(_rows(9, 4))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    results: list[Confidence] = []
    for fusion in (first, second):
        fusion.update(_rows(20, 2, start=10))
        everyone = _rows(12, 0)
        results.append(fusion.combine(everyone, _probabilities(12), everyone))
    assert torch.equal(results[0].unified, results[1].unified)


def test_gradient_reaches_the_embeddings_when_they_require_it() -> None:
    fusion, everyone = _fusion(), _rows(8, 0)
    embeddings = everyone[0].clone().requires_grad_()
    unified = fusion.combine(everyone._replace(embeddings=embeddings), _probabilities(8), everyone).unified
    (gradient,) = torch.autograd.grad(unified.sum(), embeddings)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("options", [EVIDENCE, POOL, LINEAR, {**POOL, "bandwidth": Bandwidth.adaptive}])
def test_confidence_is_finite_and_no_state_changes_when_no_rank_has_a_sample(options: dict[str, Any]) -> None:
    fusion = _fusion(**options)
    nobody = Neighbours(*(column[:0] for column in _rows(2, 0)))
    batch = plain_rows(
        torch.zeros(2, D), torch.zeros(2, C, dtype=torch.int8), _probabilities(2), torch.tensor([-1, -1])
    )
    assert fusion.combine(batch, _probabilities(2), nobody).unified.isfinite().all()
    fusion.update(_rows(5, 1))
    before = {name: value.clone() for name, value in fusion.state_dict().items()}
    fusion.update(nobody)
    assert all(torch.equal(before[name], value) for name, value in fusion.state_dict().items())


def test_neighbours_tell_present_from_absent_when_only_positives_are_known() -> None:
    """Two kinds of images, each with two classes of which one is known: the other one is hidden, not absent."""
    kind = torch.arange(40) % 2
    embeddings = torch.nn.functional.one_hot(kind, D).float()
    observed = torch.zeros(40, C, dtype=torch.int8)
    observed[torch.arange(40), 2 * kind + torch.arange(40) // 2 % 2] = 1
    truth = torch.nn.functional.one_hot(kind, 2).repeat_interleave(2, dim=1).float()
    rows = plain_rows(embeddings, observed, 0.1 + 0.8 * truth, torch.arange(40))
    fusion = _fusion(**POOL | {"instance_weight": 1.0, "label_weight": 0.5})
    fusion.update(rows)
    batch = Neighbours(*(column[:2] for column in rows))
    unified = fusion.combine(batch, torch.full((2, C), 0.3), rows).unified
    is_hidden = (truth[:2] > 0) & (observed[:2] == 0)
    assert (unified[is_hidden] > 0.5).all()
    assert (unified[truth[:2] == 0] < 0.25).all()


def test_known_positive_stands_for_those_that_the_teacher_sees() -> None:
    observed = torch.zeros(10, C, dtype=torch.int8)
    observed[:, 0], observed[:5, 1], observed[5:, 1], observed[:2, 2] = 1, 1, -1, 1
    rows = plain_rows(torch.zeros(10, D), observed, torch.full((10, C), 0.9), torch.arange(10))
    fusion = _fusion()
    fusion.update(rows)
    counting = fusion._count(rows)
    # of the last class nothing is known, as of one that nobody annotates: it is no class of positives alone
    assert counting.lacking.tolist() == [True, False, True, False]
    # the teacher sees 0.9 x 2 positives an image in the lacking classes, 1.2 are known
    assert counting.weight.tolist() == pytest.approx([1.5, 1.0, 1.5, 1.0])
    assert counting.rate.tolist() == pytest.approx([0.9, 0.5, 0.3, 17 / 22], abs=0.03)


@pytest.mark.parametrize(
    ("num_known", "seen", "weight", "rate"),
    [(1, 0.9, 10.0, 0.25), (1, 0.15, 6.0, 0.15), (20, 0.04, 1.0, 0.5), (20, 1.6, 3.2, 0.9), (1, 0.02, 1.0, 0.025)],
)
def test_hidden_positives_are_bounded_when_the_teacher_sees_far_more_or_fewer_than_are_known(
    num_known: int, seen: float, weight: float, rate: float
) -> None:
    observed = torch.zeros(40, C, dtype=torch.int8)
    observed[:num_known, 0] = 1
    rows = plain_rows(torch.zeros(40, D), observed, torch.full((40, C), seen / C), torch.arange(40))
    fusion = _fusion()
    fusion.update(rows)
    counting = fusion._count(rows)
    assert counting.weight.tolist() == pytest.approx([weight] * C, rel=1e-4)
    assert counting.rate.tolist() == pytest.approx([rate, *[1e-3] * (C - 1)], rel=1e-4)


@pytest.mark.parametrize("combine", [Combine.evidence, Combine.pool])
def test_certain_teacher_says_one_in_a_thousand_when_there_is_no_evidence(combine: Combine) -> None:
    alone = _rows(1, 0)._replace(observed=torch.zeros(1, C, dtype=torch.int8))
    certain = torch.tensor([[0.0, 1e-4, 0.9999, 1.0]])
    unified = _fusion(combine=combine, bank_size=0).combine(alone, certain, alone).unified
    torch.testing.assert_close(unified, torch.tensor([[0.001, 0.001, 0.999, 0.999]]))


def test_memory_is_each_samples_own_when_they_come_in_any_order() -> None:
    plain, tested = _fusion(**LINEAR, bank_size=0), _fusion(**LINEAR, bank_size=0, momentum=0.9, memory=Memory.dense)
    everyone, probabilities = _rows(8, 0), _probabilities(8)
    everyone = everyone._replace(
        observed=torch.zeros(8, C, dtype=torch.int8), indices=torch.tensor([700, 3, 41, 9, 999, 0, 5, 2])
    )
    order = torch.tensor([4, 0, 7, 2])
    tested.update(Neighbours(*(column[order] for column in everyone)))
    raw = plain.combine(everyone, probabilities, everyone).unified
    expected = raw.clone()
    expected[order] = 0.9 * everyone.confidence[order] + 0.1 * raw[order]
    torch.testing.assert_close(tested.combine(everyone, probabilities, everyone).unified, expected)


def test_confidence_reaches_correlation_and_bank_when_they_average_it() -> None:
    everyone, correlation = _rows(30, 0), CorrelationOptions(source=CorrelationSource.confidence)
    linear, evidence = _fusion(correlation=correlation, **LINEAR), _fusion(correlation=correlation)
    for fusion in (linear, evidence):
        fusion.update(everyone)
    filled = torch.where(everyone.observed == 0, everyone.confidence, (everyone.observed > 0).float())
    weights = torch.where(everyone.observed == 0, correlation.unknown_weight, 1.0)
    expected, _ = pearson(filled.double(), weights=weights.double())
    torch.testing.assert_close(linear.correlation.shrunk(), expected.float(), atol=1e-5, rtol=0)
    assert torch.equal(linear.bank.rows().confidence, everyone.confidence)
    assert evidence.bank.rows().confidence.shape == (30, 0)  # four bytes a cell that nobody would read


@pytest.mark.parametrize("neighbours", [1, 3, 40])
def test_bandwidth_is_the_distance_to_the_kth_other_sample_when_adaptive(neighbours: int) -> None:
    options = {"bandwidth": Bandwidth.adaptive, "bandwidth_neighbours": neighbours, "prior_strength": 0.07}
    fusion, everyone = _fusion(**options), _rows(12, 0)
    past = _rows(20, 1, start=5)  # 7 samples are in both, and are no neighbours of themselves
    everyone.embeddings[6] = everyone.embeddings[2]  # a twin: its distance of 0 is no bandwidth
    fusion.update(past)
    instance = fusion.combine(everyone, _probabilities(12), everyone).instance
    rows, rate = _joined(everyone, past), fusion.correlation.positive_rate().double().numpy()
    known, positive = (rows[1] != 0).double().numpy(), (rows[1] > 0).double().numpy()
    assert instance is not None
    for i in range(12):
        mine = Neighbours(*(column[i : i + 1] for column in everyone))
        distances = sorted(
            float((mine.embeddings[0].double() - other.double()).norm())
            for other, index in zip(rows.embeddings, rows.indices, strict=True)
            if index != mine.indices[0]
        )
        sigma = max(distances[:neighbours][-1], 1e-3)
        weights = _weights(mine, rows, sigma)
        expected = (weights @ positive + 0.07 * rate) / (weights @ known + 0.07)
        np.testing.assert_allclose(instance[i].numpy(), expected[0], atol=2e-4)


def test_class_that_was_never_seen_is_lacking_when_no_class_has_a_negative() -> None:
    fusion = _fusion()
    assert not fusion.correlation.lacks_negatives().any()
    observed = torch.zeros(10, C, dtype=torch.int8)
    observed[:, 0] = 1
    fusion.correlation.update(observed, None)
    assert fusion.correlation.lacks_negatives().all()
