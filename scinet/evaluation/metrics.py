"""Masked multi-label metrics: average precision, precision, recall and F1 over the known cells of a test set.

Legend: N images, C classes, S bootstrap samples, T distinct scores. Truth is +1 positive, -1 negative, 0 unknown;
an unknown cell never changes a number. Every figure is a percentage, 0 to 100 (method.md, section 8).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

# Ranking wants up to 80 bytes a cell; classes are taken in groups of this many cells to bound that at about 300 MB.
_CELLS_PER_CHUNK = 1 << 22


@dataclass(frozen=True)
class Metrics:
    """The scores of one evaluation; percentages, NaN where no class has a known positive.

    Class means (`mean_average_precision`, `class_*`, `mean_class_f1`, `chance`) leave out `excluded_classes`, those
    without a known positive; the `overall_*` figures pool every known cell. `chance` is the mean class frequency,
    which is the expected mean average precision of random scores on a large test set.
    """

    num_samples: int
    mean_average_precision: float
    per_class_average_precision: list[float | None]
    excluded_classes: list[int]
    class_precision: float
    class_recall: float
    class_f1: float
    overall_precision: float
    overall_recall: float
    overall_f1: float
    mean_class_f1: float
    is_partial: bool
    chance: float

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary that strict JSON can hold: NaN becomes None."""
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class _Ranking:
    """Classes sorted once by descending score, so that average precision can be had again under other image weights."""

    order: Tensor  # [C,N] int64: image at each place
    positive: Tensor  # [C,N] bool, in sorted order
    known: Tensor  # [C,N] bool, in sorted order
    row: Tensor  # [P] int64: class of each positive cell, P of them
    place: Tensor  # [P] int64: place of each positive cell
    group_end: Tensor  # [P] int64: last place of the tie group that a positive cell belongs to

    @classmethod
    def of(cls, scores: Tensor, positive: Tensor, known: Tensor) -> _Ranking:
        """Sort each row of `scores` [C,N]; unknown cells go last, where they can part no tie and weigh nothing."""
        ranked, order = scores.masked_fill(~known, -math.inf).sort(dim=1, descending=True)
        num_images = scores.shape[1]
        is_end = torch.ones_like(order, dtype=torch.bool)
        is_end[:, :-1] = ranked[:, 1:] != ranked[:, :-1]
        places = torch.arange(num_images, device=scores.device)
        group_end = torch.where(is_end, places, num_images).flip(1).cummin(dim=1).values.flip(1)
        sorted_known = known.gather(1, order)
        sorted_positive = positive.gather(1, order) & sorted_known
        row, place = sorted_positive.nonzero(as_tuple=True)
        return cls(order, sorted_positive, sorted_known, row, place, group_end[row, place])

    def average_precision(self, weight: Tensor) -> Tensor:
        """Return average precision [C] float64, 0 to 1 and NaN without a positive, under image weights [N] float64."""
        sorted_weight = weight[self.order]
        hits = (sorted_weight * self.positive).cumsum(1)
        seen = (sorted_weight * self.known).cumsum(1)
        at_end = (self.row, self.group_end)
        cell = sorted_weight[self.row, self.place] * hits[at_end] / seen[at_end].clamp(min=1)
        total = torch.zeros(len(self.order), dtype=torch.float64, device=weight.device)
        total.index_add_(0, self.row, cell)
        return total / hits[:, -1:].sum(1)  # a sum, because there may be no image


def average_precision(scores: Tensor, positive: Tensor, known: Tensor | None = None) -> float | None:
    """Return the average precision of one class over all points, each tie group counted as one threshold.

    Args:
        scores: [N] float, any range.
        positive: [N] bool.
        known: [N] bool, cells that count; all of them if None.

    Returns:
        0 to 1 as scikit-learn's `average_precision_score`; None without a known positive.

    Raises:
        ValueError: shapes differ or a score is NaN.
    """
    known = _check_one_class(scores, positive, known)
    ranking = _Ranking.of(scores[None], positive.bool()[None], known[None])
    value = float(ranking.average_precision(torch.ones(len(scores), dtype=torch.float64, device=scores.device))[0])
    return None if math.isnan(value) else value


def precision_recall_curve(scores: Tensor, positive: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return precision and recall at every distinct score of one class, from the highest score down.

    Args:
        scores: [N] float, any range.
        positive: [N] bool.
        known: [N] bool, cells that count; all of them if None.

    Returns:
        Precision [T] and recall [T] float64, 0 to 1; recall never falls, and is 0 throughout without a positive.

    Raises:
        ValueError: shapes differ or a score is NaN.
    """
    known = _check_one_class(scores, positive, known)
    ranked, order = scores[known].sort(descending=True)
    hits = positive.bool()[known][order].double().cumsum(0)
    is_end = torch.ones_like(ranked, dtype=torch.bool)
    is_end[:-1] = ranked[1:] != ranked[:-1]
    num_seen = torch.arange(1, len(ranked) + 1, dtype=torch.float64, device=scores.device)
    return (hits / num_seen)[is_end], (hits / hits[-1:].clamp(min=1))[is_end]


def evaluate(scores: Tensor, truth: Tensor, *, threshold: float = 0.5) -> Metrics:
    """Evaluate scores against truth over the known cells.

    Args:
        scores: [N,C] float, probabilities where the threshold is to mean anything.
        truth: [N,C] integer, +1 positive, -1 negative, 0 unknown.
        threshold: a class is predicted where its score is above this; ignored by average precision and chance.

    Returns:
        The metrics, with 0/0 taken as 0 in every precision, recall and F1.

    Raises:
        ValueError: wrong shape, dtype or truth code, or a NaN score.
    """
    _check_matrix(scores, truth)
    ap = _class_average_precision(scores, truth)
    positive, known, predicted = truth == 1, truth != 0, scores > threshold
    num_positive = positive.sum(0).double()
    num_predicted = (predicted & known).sum(0).double()
    num_correct = (predicted & positive).sum(0).double()
    precision, recall = _ratio(num_correct, num_predicted), _ratio(num_correct, num_positive)
    has_positive = num_positive > 0

    def class_mean(values: Tensor) -> float:
        return float(values[has_positive].mean())

    class_precision, class_recall = class_mean(precision), class_mean(recall)
    overall_precision = float(_ratio(num_correct.sum(), num_predicted.sum()))
    overall_recall = float(_ratio(num_correct.sum(), num_positive.sum()))
    return Metrics(
        num_samples=len(scores),
        mean_average_precision=100 * class_mean(ap),
        per_class_average_precision=[None if math.isnan(value) else 100 * value for value in ap.tolist()],
        excluded_classes=(~has_positive).nonzero().flatten().tolist(),
        class_precision=100 * class_precision,
        class_recall=100 * class_recall,
        class_f1=100 * _harmonic_mean(class_precision, class_recall),
        overall_precision=100 * overall_precision,
        overall_recall=100 * overall_recall,
        overall_f1=100 * _harmonic_mean(overall_precision, overall_recall),
        mean_class_f1=100 * class_mean(_ratio(2 * num_correct, num_predicted + num_positive)),
        is_partial=not bool(known.all()),
        chance=100 * class_mean(_ratio(num_positive, known.sum(0).double())),
    )


def paired_bootstrap(
    scores_a: Tensor, scores_b: Tensor, truth: Tensor, *, samples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Resample test images and compare two models on the same resamples.

    A class that a resample leaves without a positive is left out of that resample, for both models alike.

    Args:
        scores_a: [N,C] float, scores of the first model.
        scores_b: [N,C] float, scores of the second.
        truth: [N,C] integer, +1 positive, -1 negative, 0 unknown.
        samples: number of resamples S, at least 1.
        seed: the result is a pure function of it and the data on one device.

    Returns:
        Mean of mAP(a) - mAP(b) over the resamples, and the ends of its 95 % percentile interval; percentage points.

    Raises:
        ValueError: as `evaluate`; no known positive at all; fewer than one resample.
    """
    _check_matrix(scores_a, truth, name="scores_a")
    _check_matrix(scores_b, truth, name="scores_b")
    if not bool((truth == 1).any()):
        raise ValueError("truth has no known positive, so there is no average precision to compare: use other images")
    if samples < 1:
        raise ValueError(f"samples is {samples}: at least 1 resample is required, 1000 is usual")
    differences = bootstrap(scores_a, truth, samples=samples, seed=seed) - bootstrap(
        scores_b, truth, samples=samples, seed=seed
    )
    differences = differences[differences.isfinite()]
    if not len(differences):
        raise ValueError(f"none of {samples} resamples drew a positive: use more resamples or more test images")
    return float(differences.mean()), *percentile_interval(differences)


def bootstrap(scores: Tensor, truth: Tensor, *, samples: int = 1000, seed: int = 0) -> Tensor:
    """Return the mAP of each resample of the test images.

    Two models on one truth have the same resamples, and in each the same classes, so their differences are paired.

    Args:
        scores: [N,C] float.
        truth: [N,C] integer, +1 positive, -1 negative, 0 unknown.
        samples: number of resamples S, at least 1.
        seed: of the resamples.

    Returns:
        [S] float64 on the CPU, percentages; NaN where no image with a positive was drawn.

    Raises:
        ValueError: as `evaluate`.
    """
    _check_matrix(scores, truth)
    num_images = len(truth)
    total = torch.zeros(samples, dtype=torch.float64, device=truth.device)
    num_classes = torch.zeros_like(total)
    for columns in _chunks(truth):
        part = truth[:, columns].T.contiguous()
        ranking = _Ranking.of(scores[:, columns].T.contiguous(), part == 1, part != 0)
        # Every group of classes draws the same images again, which spares keeping S x N weights.
        generator = torch.Generator().manual_seed(seed)
        for index in range(samples):
            drawn = torch.randint(num_images, (num_images,), generator=generator)
            weight = drawn.bincount(minlength=num_images).to(truth.device, torch.float64)
            values = ranking.average_precision(weight)
            total[index] += values.nansum()
            num_classes[index] += (~values.isnan()).sum()
    return (100 * total / num_classes).cpu()


def percentile_interval(values: Tensor) -> tuple[float, float]:
    """Return the ends of the 95 % percentile interval of resampled values [S] float64."""
    low, high = torch.quantile(values, values.new_tensor([0.025, 0.975])).tolist()
    return low, high


def _class_average_precision(scores: Tensor, truth: Tensor) -> Tensor:
    """Return average precision [C] float64, 0 to 1, NaN for a class without a known positive."""
    weight = torch.ones(len(scores), dtype=torch.float64, device=scores.device)
    parts = []
    for columns in _chunks(truth):
        part = truth[:, columns].T.contiguous()
        ranking = _Ranking.of(scores[:, columns].T.contiguous(), part == 1, part != 0)
        parts.append(ranking.average_precision(weight))
    return torch.cat(parts)


def _chunks(truth: Tensor) -> list[slice]:
    """Return slices of classes that are cheap enough to sort at once."""
    num_images, num_classes = truth.shape
    step = max(1, _CELLS_PER_CHUNK // max(1, num_images))
    return [slice(start, start + step) for start in range(0, num_classes, step)]


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide counts, 0/0 = 0: a denominator of zero always comes with a numerator of zero here."""
    return numerator / denominator.clamp(min=1)


def _harmonic_mean(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0


def _check_one_class(scores: Tensor, positive: Tensor, known: Tensor | None) -> Tensor:
    """Check the arguments of a one-class function and return the mask of known cells [N] bool."""
    known = torch.ones_like(positive, dtype=torch.bool) if known is None else known.bool()
    if scores.ndim != 1 or positive.shape != scores.shape or known.shape != scores.shape:
        raise ValueError(
            f"scores {list(scores.shape)}, positive {list(positive.shape)} and known {list(known.shape)} "
            "must be three vectors of one length: pass one class at a time"
        )
    if bool(scores.isnan().any()):
        raise ValueError(f"scores hold {int(scores.isnan().sum())} NaN of {len(scores)}: find where they arise")
    return known


def _check_matrix(scores: Tensor, truth: Tensor, *, name: str = "scores") -> None:
    if scores.ndim != 2 or scores.shape != truth.shape or not scores.shape[1]:
        raise ValueError(
            f"{name} {list(scores.shape)} and truth {list(truth.shape)} must both be [images, classes], one class at "
            "least: pass one row an image and one column a class to both"
        )
    if not scores.is_floating_point() or truth.is_floating_point() or truth.dtype == torch.bool:
        raise ValueError(
            f"{name} is {scores.dtype} and truth {truth.dtype}: scores must be floating point and truth integer codes "
            "(+1 positive, -1 negative, 0 unknown); translate 0/1 truth with 2 * truth - 1"
        )
    if bool(((truth < -1) | (truth > 1)).any()):
        raise ValueError(f"truth holds codes from {int(truth.min())} to {int(truth.max())}: only +1, 0, -1 are defined")
    bad = scores.isnan().any(0).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{name} hold NaN, first in class {int(bad[0])} ({len(bad)} of {scores.shape[1]} classes): "
            "find where they arise, a ranking of NaN means nothing"
        )
