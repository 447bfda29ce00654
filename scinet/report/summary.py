"""The page of one run: picks what to show from its evaluation, history and test images."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from scinet import rundir
from scinet.data.card import DataCard
from scinet.data.images import opened
from scinet.data.stream import Order, SampleStream, StoredSample
from scinet.data.views import SHARD_FORMATS
from scinet.evaluation.evaluator import Scores
from scinet.options import DataOptions, Options
from scinet.report.page import Example, write_report
from scinet.rundir import RunDirectory

_NUM_EXAMPLES = 12
_TOP = 5


def write(
    directory: RunDirectory,
    options: Options,
    card: DataCard,
    evaluation: dict[str, Any],
    history: list[dict[str, Any]],
    scores: Scores,
    correlation: Tensor | None,
) -> Path:
    """Write ``report.html`` of a run and return its path.

    Args:
        directory: of the run.
        options: of the run.
        card: of its data.
        evaluation: what ``evaluation.json`` holds.
        history: rows of ``metrics.jsonl``.
        scores: of the test split, by the model the page is about.
        correlation: [C, C], or None for a baseline.
    """
    shown = evaluation["selected"]["teacher"] if "selected" in evaluation else evaluation["zero_shot"]
    return write_report(
        directory.path,
        title=f"{options.name}: {options.method.value} on {card.name}, {_known(options.data)}",
        summary=headline(options, evaluation),
        history=history,
        class_names=list(card.class_names),
        evaluation=shown,
        scores=scores.probabilities.numpy(),
        truth=scores.truth.numpy(),
        label_correlation=None if correlation is None else correlation.numpy(),
        examples=_examples(card, scores, options.data),
    )


def _known(data: DataOptions) -> str:
    if data.mask_file:
        return f"labels known as in {Path(data.mask_file).name}"
    words = "one positive an image known" if data.single_positive else f"{data.known_ratio:.0%} of labels known"
    if data.class_ratio_spread:
        words += f" (class ratios spread by {data.class_ratio_spread:g})"
    if data.annotated_classes < 1:
        words += f" in {data.annotated_classes:.0%} of the classes"
    return words + (f", {data.flipped_labels:.0%} of them flipped" if data.flipped_labels else "")


def headline(options: Options, evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a run achieved, as (what, value), beside its baseline, zero-shot and chance."""
    if not options.train.test_at_end:
        return [("Hold-out mAP, teacher at the selected epoch", f"{evaluation['selected']['holdout_map']:.1f}")]
    rows = []
    if "selected" in evaluation:
        selected, last = evaluation["selected"], evaluation["last"]
        rows = [
            ("Test mAP, teacher at the selected epoch", _map(selected["teacher"])),
            *([("Test mAP, teacher and bank (fused)", _map(selected["fused"]))] if "fused" in selected else []),
            ("Test mAP, student at the selected epoch", _map(selected["student"])),
            ("Test mAP, teacher at the last step", _map(last["teacher"])),
        ]
    if options.baseline:
        baseline, theirs = rundir.find(Path(options.baseline))
        result = rundir.read_evaluation(baseline)["selected"]["teacher"]
        rows.append((f"Test mAP, teacher of the baseline ({theirs.method.value}, {theirs.name})", _map(result)))
    rows.append(("Zero-shot test mAP, before training", _map(evaluation["zero_shot"])))
    rows.append(("Chance (mean class frequency)", f"{evaluation['zero_shot']['chance']:.1f}"))
    return rows


def _map(metrics: dict[str, Any]) -> str:
    return f"{metrics['mean_average_precision']:.1f}"


def _decodable(sample: StoredSample) -> StoredSample:
    # Pillow refuses what torchvision does, but for one of 2,700 JPEGs damaged at random, and needs no long import; an
    # eighth of the size meets the same damage
    with opened(sample.image, sample.where, SHARD_FORMATS) as image:
        image.draft(image.mode, (max(image.width // 8, 1), max(image.height // 8, 1)))
        image.convert("RGB")
    return sample


def _examples(card: DataCard, scores: Scores, data: DataOptions) -> list[Example]:
    stream = SampleStream(card, "test", Order(0, 0, 1, 0), transform=_decodable, options=data)
    # the scores leave out what was skipped, which was named then
    samples = islice((sample for sample in stream if isinstance(sample, StoredSample)), _NUM_EXAMPLES)
    examples = []
    for sample, probabilities in zip(samples, scores.probabilities, strict=False):
        best = probabilities.topk(min(_TOP, card.num_classes))
        predicted = [
            (card.class_names[label], value)
            for label, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        truth = [name for name, label in zip(card.class_names, sample.truth.tolist(), strict=True) if label > 0]
        examples.append(Example(sample.image, sample.sample_id, truth, predicted))
    return examples
