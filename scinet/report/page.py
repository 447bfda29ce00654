"""The report page: one HTML file that needs nothing else, neither network nor script.

Legend: N images, C classes. Class and file names, and the images themselves, come from strangers: names are escaped by
Jinja2 or cleaned by `charts.chart_label`, charts are images (which cannot run anything), photographs are decoded and
encoded again, and the page forbids every request by its own content security policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scinet.report import charts
from scinet.report.rendering import Chart, chart, image_source, render, write_page

DECISION_THRESHOLD = 0.5
"""A class counts as predicted above this probability, as in `scinet.evaluation.metrics.evaluate`."""

_MAX_HEAT_MAP_CLASSES = 80

_LOSSES = {"loss/total": "total", "loss/supervised": "supervised"}
_UNSUPERVISED = {
    "loss/consistency_weak": "consistency, weak to medium",
    "loss/consistency_medium": "consistency, medium to strong",
    "loss/distillation": "distillation",
}
_FUSION_WEIGHTS = {
    "fusion/weight_teacher": "teacher",
    "fusion/weight_instance": "similar images",
    "fusion/weight_label": "other labels",
    "fusion/weight_region": "similar regions",
}
_FUSION_WORTH = {
    "fusion/map_teacher": "teacher alone",
    "fusion/map_instance": "with similar images",
    "fusion/map_label": "with other labels",
    "fusion/map_fused": "fused",
}
_PSEUDO_LABELS = {"pseudo_precision": "precision", "pseudo_recall": "recall"}


@dataclass(frozen=True)
class Example:
    """One test image with what is true of it and what was predicted.

    `predicted` holds (class name, probability), highest first: as many as are worth showing, the most likely K or all
    above some probability. A class above 0.5 counts as predicted; one below is shown as unlikely, or as missed where
    it is true.
    """

    jpeg: bytes
    name: str
    truth: list[str]
    predicted: list[tuple[str, float]]


@dataclass(frozen=True)
class _ClassRow:
    name: str
    average_precision: float | None
    num_positives: int


@dataclass(frozen=True)
class _Verdict:
    kind: str  # "correct", "wrong", "missed" or "unlikely"
    name: str
    probability: float | None


@dataclass(frozen=True)
class _Picture:
    name: str
    source: str | None
    verdicts: list[_Verdict]


def write_report(
    directory: Path,
    *,
    title: str,
    summary: list[tuple[str, str]],
    history: list[dict[str, Any]],
    class_names: list[str],
    evaluation: dict[str, Any],
    scores: np.ndarray,
    truth: np.ndarray,
    label_correlation: np.ndarray | None,
    examples: list[Example],
) -> Path:
    """Write `report.html` into a directory, whole or not at all.

    Args:
        directory: made if it is missing.
        title: the headline.
        summary: (what, value) of the headline table, in order, such as ("teacher mAP", "41.3").
        history: rows of metrics.jsonl; every key but the position ("samples_seen" or "step") may be absent.
        class_names: C names.
        evaluation: `Metrics.to_json()` of the scores below.
        scores: [N,C] float probabilities.
        truth: [N,C] int8, +1 positive, -1 negative, 0 unknown.
        label_correlation: [C,C] float, -1 to 1; None leaves the heat map out.
        examples: test images to show.

    Returns:
        The path of the page.

    Raises:
        ValueError: shapes that do not belong together, or an evaluation of other classes.
    """
    per_class = _check(class_names, evaluation, scores, truth, label_correlation)
    num_positives = (truth == 1).sum(0)
    rows = [_ClassRow(*row) for row in zip(class_names, per_class, num_positives.tolist(), strict=True)]
    rows.sort(key=lambda row: (row.average_precision is None, -(row.average_precision or 0.0), row.name))
    heat_map, strongest, num_shown = _correlation(label_correlation, class_names, num_positives)
    page = render(
        "page.html.j2",
        title=title,
        summary=summary,
        evaluation=evaluation,
        num_images=len(scores),
        curves=_curves(history),
        rows=rows,
        precision_recall=_precision_recall(scores, truth, class_names, per_class),
        heat_map=heat_map,
        strongest=strongest,
        num_shown=num_shown,
        num_classes=len(class_names),
        pictures=[_picture(example) for example in examples],
        threshold=DECISION_THRESHOLD,
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "report.html"
    write_page(path, page)
    return path


def judge(example: Example) -> list[_Verdict]:
    """Compare an example's predictions with its truth: correct, wrong and unlikely as predicted, then missed."""
    true, verdicts, probability = set(example.truth), [], dict(example.predicted)
    for name, value in example.predicted:
        if value > DECISION_THRESHOLD:
            verdicts.append(_Verdict("correct" if name in true else "wrong", name, value))
    for name in dict.fromkeys(example.truth):
        value_or_none = probability.get(name)
        if value_or_none is None or value_or_none <= DECISION_THRESHOLD:
            verdicts.append(_Verdict("missed", name, value_or_none))
    unlikely = [pair for pair in example.predicted if pair[1] <= DECISION_THRESHOLD and pair[0] not in true]
    return verdicts + [_Verdict("unlikely", name, value) for name, value in unlikely]


def _check(
    class_names: list[str],
    evaluation: dict[str, Any],
    scores: np.ndarray,
    truth: np.ndarray,
    label_correlation: np.ndarray | None,
) -> list[float | None]:
    """Check that the arguments describe the same classes and return average precision by class."""
    num_classes = len(class_names)
    if scores.ndim != 2 or scores.shape != truth.shape or scores.shape[1] != num_classes:
        raise ValueError(
            f"scores {list(scores.shape)} and truth {list(truth.shape)} must both be [images, {num_classes}], "
            "one column a class name"
        )
    if label_correlation is not None and label_correlation.shape != (num_classes, num_classes):
        raise ValueError(f"label_correlation is {list(label_correlation.shape)}, required: {[num_classes] * 2}")
    per_class: list[float | None] | None = evaluation.get("per_class_average_precision")
    if per_class is None or len(per_class) != num_classes:
        raise ValueError(
            f"evaluation needs per_class_average_precision of {num_classes} classes: pass Metrics.to_json() of the "
            "same scores"
        )
    return per_class


def _curves(history: Sequence[dict[str, Any]]) -> list[Chart]:
    drawn = [
        chart(
            charts.line_chart(history, {"holdout_map": "hold-out mAP"}, mark_best=True),
            "Hold-out mAP",
            _range_alt(history, {"holdout_map": "Hold-out mAP"}),
        ),
        chart(charts.line_chart(history, _LOSSES), "Losses", _range_alt(history, _LOSSES)),
        chart(
            charts.line_chart(history, _UNSUPERVISED),
            "Losses on unknown labels",
            _range_alt(history, _UNSUPERVISED),
        ),
        chart(
            charts.line_chart(history, _PSEUDO_LABELS),
            "Pseudo labels against the truth",
            _range_alt(history, _PSEUDO_LABELS),
        ),
        chart(
            charts.line_chart(history, _FUSION_WORTH),
            "What the fusion's evidence is worth: mAP on known cells of the hold-out",
            _range_alt(history, _FUSION_WORTH),
        ),
        chart(
            charts.line_chart(history, _FUSION_WEIGHTS),
            "Fitted weights of the fusion",
            _range_alt(history, _FUSION_WEIGHTS),
        ),
        chart(
            charts.line_chart(history, {"learning_rate": "learning rate"}),
            "Learning rate",
            _range_alt(history, {"learning_rate": "Learning rate"}),
        ),
    ]
    return [chart for chart in drawn if chart is not None]


def _range_alt(history: Sequence[dict[str, Any]], keys: dict[str, str]) -> str:
    """Say in words what a line chart shows."""
    parts = []
    for key, label in keys.items():
        axis, _, y = charts.series(history, key)
        if len(y):
            parts.append(
                f"{label} over {axis}: first {y[0]:.4g}, last {y[-1]:.4g}, from {y.min():.4g} to {y.max():.4g}"
            )
    return "; ".join(parts)


def _precision_recall(
    scores: np.ndarray, truth: np.ndarray, class_names: list[str], per_class: list[float | None]
) -> Chart | None:
    svg = charts.precision_recall_chart(scores, truth, class_names, per_class)
    alt = "Precision over recall for all cells together, the three best and the three worst classes"
    return chart(svg, "Precision and recall", alt)


def _correlation(
    correlation: np.ndarray | None, class_names: list[str], num_positives: np.ndarray
) -> tuple[Chart | None, list[tuple[str, str, float]], int]:
    """Return the heat map, the eight strongest pairs in words, and how many classes the map shows."""
    if correlation is None:
        return None, [], 0
    first, second = np.triu_indices(len(class_names), k=1)
    values = (correlation[first, second] + correlation[second, first]) / 2
    order = np.argsort(-np.nan_to_num(np.abs(values)), kind="stable")[:8]
    strongest = [
        (class_names[first[index]], class_names[second[index]], float(values[index]))
        for index in order
        if np.isfinite(values[index])
    ]
    most_frequent = np.argsort(-num_positives, kind="stable")[:_MAX_HEAT_MAP_CLASSES]
    shown = np.sort(most_frequent)
    svg = charts.correlation_chart(correlation[np.ix_(shown, shown)], [class_names[index] for index in shown])
    pairs = ", ".join(f"{a} with {b} {value:+.2f}" for a, b, value in strongest[:3])
    alt = f"Heat map of the correlation between {len(shown)} classes" + (f"; strongest: {pairs}" if pairs else "")
    return chart(svg, "Label correlation", alt, is_wide=True), strongest, len(shown)


def _picture(example: Example) -> _Picture:
    return _Picture(example.name, image_source(example.jpeg, example.name), judge(example))
