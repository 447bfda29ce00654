"""The masked metrics against scikit-learn, hand-computed cases and the properties that any ranking metric has."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from scinet.evaluation import metrics as metrics_module
from scinet.evaluation.metrics import average_precision, evaluate, paired_bootstrap, precision_recall_curve


def make_case(
    seed: int, *, num_images: int = 101, num_classes: int = 7, levels: int = 6, unknown: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores on few levels, so heavy with ties, and truth with a share of unknown cells."""
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.integers(0, levels, (num_images, num_classes)) / max(1, levels - 1)).float()
    truth = np.where(rng.random((num_images, num_classes)) < 0.3, 1, -1)
    truth[rng.random((num_images, num_classes)) < unknown] = 0
    return scores, torch.from_numpy(truth.astype(np.int8))


@pytest.mark.parametrize("levels", [1, 2, 6, 10_000])
@pytest.mark.parametrize("unknown", [0.0, 0.4])
def test_evaluate_equals_scikit_learn_when_scores_are_tied(levels: int, unknown: float) -> None:
    scores, truth = make_case(levels, levels=levels, unknown=unknown)
    result = evaluate(scores, truth)
    expected: dict[str, list[float]] = {"ap": [], "precision": [], "recall": [], "f1": [], "frequency": []}
    for column in range(scores.shape[1]):
        known = truth[:, column] != 0
        wanted, score = (truth[known, column] == 1).numpy(), scores[known, column].numpy()
        predicted = score > 0.5
        expected["ap"].append(oracle.average_precision_score(wanted, score))
        expected["precision"].append(oracle.precision_score(wanted, predicted, zero_division=0))
        expected["recall"].append(oracle.recall_score(wanted, predicted, zero_division=0))
        expected["f1"].append(oracle.f1_score(wanted, predicted, zero_division=0))
        expected["frequency"].append(wanted.mean())
    mean = {name: 100 * float(np.mean(values)) for name, values in expected.items()}
    assert result.per_class_average_precision == pytest.approx([100 * ap for ap in expected["ap"]], abs=1e-6)
    assert result.mean_average_precision == pytest.approx(mean["ap"], abs=1e-6)
    assert result.class_precision == pytest.approx(mean["precision"], abs=1e-6)
    assert result.class_recall == pytest.approx(mean["recall"], abs=1e-6)
    assert result.mean_class_f1 == pytest.approx(mean["f1"], abs=1e-6)
    assert result.chance == pytest.approx(mean["frequency"], abs=1e-6)
    cells = truth != 0
    wanted, predicted = (truth == 1)[cells].numpy(), (scores > 0.5)[cells].numpy()
    assert result.overall_precision == pytest.approx(100 * oracle.precision_score(wanted, predicted, zero_division=0))
    assert result.overall_recall == pytest.approx(100 * oracle.recall_score(wanted, predicted))
    assert result.overall_f1 == pytest.approx(100 * oracle.f1_score(wanted, predicted))
    assert result.is_partial == (unknown > 0)


@pytest.mark.parametrize("chunk", [1, 150, 1 << 22])
def test_evaluate_is_the_same_when_classes_are_taken_in_groups(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, truth = make_case(3, unknown=0.3)
    whole, interval = evaluate(scores, truth), paired_bootstrap(scores, scores.flip(1), truth, samples=20)
    monkeypatch.setattr(metrics_module, "_CELLS_PER_CHUNK", chunk)
    assert evaluate(scores, truth) == whole
    assert paired_bootstrap(scores, scores.flip(1), truth, samples=20) == pytest.approx(interval, abs=1e-9)


def test_metrics_equal_the_hand_computed_values_when_cells_are_unknown() -> None:
    # Class 0: known + at 0.9, known - at 0.8, known + at 0.4; an unknown at 0.95.  AP = (1/1 + 2/3) / 2 = 5/6.
    # Class 1: known + at 0.3 below a known - at 0.6; two unknown.                    AP = 1/2.
    # Class 2: no known positive: excluded from the class means; its false positive counts overall.
    scores = torch.tensor([[0.9, 0.6, 0.7], [0.8, 0.3, 0.1], [0.4, 0.9, 0.9], [0.95, 0.1, 0.2]])
    truth = torch.tensor([[1, -1, -1], [-1, 1, -1], [1, 0, 0], [0, 0, -1]], dtype=torch.int8)
    result = evaluate(scores, truth)
    assert result.num_samples == 4
    assert result.excluded_classes == [2]
    assert result.is_partial
    assert result.per_class_average_precision == [pytest.approx(500 / 6), pytest.approx(50), None]
    assert result.mean_average_precision == pytest.approx((500 / 6 + 50) / 2)
    assert result.class_precision == pytest.approx(25)  # 1/2 and 0/1
    assert result.class_recall == pytest.approx(25)  # 1/2 and 0/1
    assert result.class_f1 == pytest.approx(25)
    assert result.mean_class_f1 == pytest.approx(25)  # 1/2 and 0
    assert result.overall_precision == pytest.approx(25)  # 1 of 4: two in class 0, one each in classes 1 and 2
    assert result.overall_recall == pytest.approx(100 / 3)
    assert result.overall_f1 == pytest.approx(200 / 7)
    assert result.chance == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)


def test_class_f1_is_the_harmonic_mean_of_the_means_when_classes_differ() -> None:
    # Class 0: precision 1/2, recall 1.  Class 1: precision 1, recall 1/2.  Means 3/4 and 3/4, so CF1 3/4; each F1 2/3.
    scores = torch.tensor([[0.9, 0.9], [0.9, 0.1]])
    truth = torch.tensor([[1, 1], [-1, 1]], dtype=torch.int8)
    result = evaluate(scores, truth)
    assert result.class_f1 == pytest.approx(75)
    assert result.mean_class_f1 == pytest.approx(200 / 3)


def test_a_score_on_the_threshold_is_not_predicted() -> None:
    truth = torch.ones(1, 1, dtype=torch.int8)
    assert evaluate(torch.full((1, 1), 0.5), truth).overall_recall == 0
    assert evaluate(torch.full((1, 1), 0.5), truth, threshold=0.4).overall_recall == 100


def test_average_precision_is_none_when_no_positive_is_known() -> None:
    scores, positive = torch.tensor([0.1, 0.9]), torch.tensor([False, True])
    assert average_precision(scores, positive) == 1.0
    assert average_precision(scores, torch.zeros(2, dtype=torch.bool)) is None
    assert average_precision(scores, positive, torch.tensor([True, False])) is None
    assert average_precision(torch.zeros(0), torch.zeros(0, dtype=torch.bool)) is None


def test_unknown_cells_are_no_negatives_when_a_known_score_is_the_lowest_there_is() -> None:
    scores, positive = torch.tensor([-math.inf, -math.inf, 0.0]), torch.tensor([True, False, False])
    assert average_precision(scores, positive, torch.tensor([True, False, True])) == 0.5
    assert average_precision(scores, positive) == pytest.approx(1 / 3)


@pytest.mark.parametrize("num_images", [0, 3])
def test_metrics_are_nan_and_json_null_when_no_class_has_a_positive(num_images: int) -> None:
    result = evaluate(torch.rand(num_images, 2), torch.full((num_images, 2), -1, dtype=torch.int8))
    assert math.isnan(result.mean_average_precision)
    assert result.per_class_average_precision == [None, None]
    record = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert record["mean_average_precision"] is None
    assert record["excluded_classes"] == [0, 1]
    assert record["overall_f1"] == 0


@given(seed=st.integers(0, 10**6), transform=st.sampled_from([torch.exp, torch.tanh, lambda x: 3 * x - 7]))
@settings(max_examples=25, deadline=None)
def test_average_precision_is_unchanged_when_scores_are_transformed_monotonely(seed: int, transform: Any) -> None:
    scores, truth = make_case(seed, num_images=40, unknown=0.2)
    before, after = evaluate(scores.double(), truth), evaluate(transform(scores.double()), truth)
    assert after.per_class_average_precision == before.per_class_average_precision


@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_metrics_are_unchanged_when_images_are_permuted_or_unknown_scores_change(seed: int) -> None:
    scores, truth = make_case(seed, num_images=40, unknown=0.3)
    generator = torch.Generator().manual_seed(seed)
    result = evaluate(scores, truth)
    shuffled = torch.randperm(len(scores), generator=generator)
    assert evaluate(scores[shuffled], truth[shuffled]) == result
    noise = torch.randn(scores.shape, generator=generator).masked_fill(truth != 0, 0) * 100
    assert evaluate(scores + noise, truth) == result
    assert evaluate(scores.masked_fill(truth == 0, -math.inf), truth) == result
    assert evaluate(scores.masked_fill(truth == 0, math.inf), truth) == result


@given(seed=st.integers(0, 10**6), unknown=st.sampled_from([0.0, 0.5]))
@settings(max_examples=20, deadline=None)
def test_every_metric_is_one_hundred_when_scores_are_the_truth(seed: int, unknown: float) -> None:
    _, truth = make_case(seed, num_images=60, unknown=unknown)
    result = evaluate((truth == 1).float(), truth)
    assert result.mean_average_precision == pytest.approx(100)
    assert result.class_f1 == result.overall_f1 == result.mean_class_f1 == pytest.approx(100)


def test_average_precision_is_exact_when_scores_are_bfloat16() -> None:
    scores, truth = make_case(5, levels=300)
    low = scores.bfloat16()
    assert evaluate(low, truth).per_class_average_precision == evaluate(low.double(), truth).per_class_average_precision


@pytest.mark.parametrize(
    ("scores", "truth", "message"),
    [
        (torch.rand(3, 2), torch.ones(2, 2, dtype=torch.int8), r"scores \[3, 2\] and truth \[2, 2\]"),
        (torch.rand(3), torch.ones(3, dtype=torch.int8), "images, classes"),
        (torch.rand(3, 0), torch.ones(3, 0, dtype=torch.int8), "one class at least"),
        (torch.rand(3, 2), torch.ones(3, 2), "integer codes"),
        (torch.rand(3, 2), torch.ones(3, 2, dtype=torch.bool), "integer codes"),
        (torch.ones(3, 2, dtype=torch.int64), torch.ones(3, 2, dtype=torch.int8), "floating point"),
        (torch.rand(3, 2), torch.full((3, 2), -128, dtype=torch.int8), "codes from -128"),
        (torch.tensor([[0.1, 0.2, math.nan, math.nan]]), torch.ones(1, 4, dtype=torch.int8), r"class 2 \(2 of 4"),
        # An unknown cell does not excuse it: NaN says that the model is broken.
        (torch.tensor([[0.1, math.nan]]), torch.tensor([[1, 0]], dtype=torch.int8), "class 1"),
    ],
)
def test_evaluate_says_what_is_wrong_when_the_input_is(scores: torch.Tensor, truth: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(scores, truth)


def test_one_class_functions_say_what_is_wrong_when_the_input_is() -> None:
    with pytest.raises(ValueError, match="one length"):
        average_precision(torch.rand(3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="NaN"):
        precision_recall_curve(torch.tensor([math.nan]), torch.ones(1, dtype=torch.bool))


@pytest.mark.parametrize("levels", [1, 5, 1000])
def test_precision_recall_curve_equals_scikit_learn_when_scores_are_tied(levels: int) -> None:
    scores, truth = make_case(levels, levels=levels, unknown=0.3)
    known, positive = truth[:, 0] != 0, truth[:, 0] == 1
    precision, recall = precision_recall_curve(scores[:, 0], positive, known)
    expected_precision, expected_recall, _ = oracle.precision_recall_curve(positive[known], scores[:, 0][known])
    # scikit-learn lists the lowest threshold first and adds the point (recall 0, precision 1) at the end.
    np.testing.assert_allclose(precision, expected_precision[-2::-1], atol=1e-12)
    np.testing.assert_allclose(recall, expected_recall[-2::-1], atol=1e-12)
    area = float((precision * recall.diff(prepend=torch.zeros(1))).sum())
    assert area == pytest.approx(average_precision(scores[:, 0], positive, known), abs=1e-12)


def test_precision_recall_curve_is_finite_when_no_positive_is_known() -> None:
    precision, recall = precision_recall_curve(torch.tensor([0.1, 0.2]), torch.zeros(2, dtype=torch.bool))
    assert precision.tolist() == recall.tolist() == [0, 0]
    assert len(precision_recall_curve(torch.rand(2), torch.ones(2).bool(), torch.zeros(2).bool())[0]) == 0


def test_paired_bootstrap_equals_evaluate_on_the_resampled_images() -> None:
    scores_a, truth = make_case(1, unknown=0.2)
    scores_b = make_case(2)[0]
    result = paired_bootstrap(scores_a, scores_b, truth, samples=30, seed=4)
    generator = torch.Generator().manual_seed(4)
    differences = []
    for _ in range(30):
        drawn = torch.randint(len(truth), (len(truth),), generator=generator)
        a, b = evaluate(scores_a[drawn], truth[drawn]), evaluate(scores_b[drawn], truth[drawn])
        differences.append(a.mean_average_precision - b.mean_average_precision)
    assert result == pytest.approx((np.mean(differences), *np.percentile(differences, [2.5, 97.5])), abs=1e-9)


def test_paired_bootstrap_interval_tells_a_better_model_when_it_is_better() -> None:
    _, truth = make_case(7, num_images=300)
    noise = torch.from_numpy(np.random.default_rng(0).random(truth.shape)).float()
    good = (truth == 1) * 0.5 + noise
    mean, low, high = paired_bootstrap(good, noise, truth, samples=100)
    assert 0 < low <= mean <= high
    assert paired_bootstrap(noise, good, truth, samples=100) == pytest.approx((-mean, -high, -low))
    assert paired_bootstrap(good, good, truth, samples=100) == (0, 0, 0)
    assert paired_bootstrap(good, noise, truth, samples=100, seed=1) != (mean, low, high)


def test_paired_bootstrap_survives_when_a_resample_loses_its_only_positive() -> None:
    truth = torch.full((6, 2), -1, dtype=torch.int8)
    truth[0, 0] = 1
    scores = torch.rand(6, 2)
    mean, low, high = paired_bootstrap(truth.float(), scores, truth, samples=50)
    assert all(math.isfinite(value) for value in (mean, low, high))
    with pytest.raises(ValueError, match="no known positive"):
        paired_bootstrap(scores, scores, -truth.abs())
    with pytest.raises(ValueError, match="scores_b"):
        paired_bootstrap(scores, scores[:5], truth)
    with pytest.raises(ValueError, match="at least 1"):
        paired_bootstrap(scores, scores, truth, samples=0)
