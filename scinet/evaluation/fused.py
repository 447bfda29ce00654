"""The fused answer over a split: its terms and weights judged on honest cells, and the classifier built for inference.

Honest are the cells of hold-out images, which are never trained on, whose label the mask shows. An image's own labels
are what is predicted there and never evidence, as on a test image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scinet.assembling import num_regions
from scinet.distributed import Ranks
from scinet.evaluation.evaluator import Computed, Inputs, PlainSplit, Scores
from scinet.evaluation.metrics import evaluate
from scinet.fusion import evidence
from scinet.fusion import weights as fusion_weights
from scinet.fusion.bank import Neighbours, rows_of
from scinet.fusion.classifier import FusedClassifier
from scinet.fusion.evidence import CoCounts, LabelStatistics, Reference
from scinet.materials import Materials
from scinet.model.network import Output
from scinet.options import Method, Options, Profile, Weights

COMBINATIONS = {
    "teacher": (0, 4),
    "instance": (0, 1, 4),
    "label": (0, 2, 4),
    "region": (0, 3, 4),
    "fused": (0, 1, 2, 3, 4),
}
"""Columns of ``weights.TERMS`` that are fitted together: P alone, P with one term, and all."""

_UNSEEN = -1
_LEAST, _BINS = 1e-4, 10


def is_wanted(options: Options) -> bool:
    """Return whether a trained run gets a fused classifier; any method can, whatever its loss."""
    fusion = options.fusion
    is_trained_on_parts = options.method not in (Method.zero_shot, Method.full_labels)
    is_fitted = fusion.enabled and fusion.weights is Weights.fitted and fusion.bank_size > 0
    return is_trained_on_parts and is_fitted and options.profile is not Profile.release


def asking(output: Output, *, num_regions: int, observed: Tensor | None = None) -> Neighbours:
    """Return images that are in no bank as rows that ask.

    Args:
        output: of a network on B of them.
        num_regions: R.
        observed: [B, C] labels that are known of them; none are without it.
    """
    unseen = torch.full((len(output.logits),), _UNSEEN, device=output.logits.device)
    if observed is None:
        observed = torch.zeros_like(output.logits, dtype=torch.int8)
    return rows_of(output, observed, unseen, num_regions=num_regions)


def terms(
    forward: Callable[[Tensor], Output], classifier: FusedClassifier
) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    """Return what gives a batch's probabilities [B, C] and the terms of its cells [B, C, 5]."""

    def answer(batch: Inputs) -> tuple[Tensor, Tensor]:
        query = asking(forward(batch.inputs), num_regions=classifier.num_regions)
        return query.confidence, fusion_weights.features(query.confidence, classifier.evidence(query))

    return answer


def judge(computed: Computed) -> tuple[Tensor | None, dict[str, float]]:
    """Return the fitted weights, and what each term is worth on the honest cells.

    Args:
        computed: by :func:`terms`, over the hold-out.

    Returns:
        the weights [5], None where nothing can be fitted; and by name the weights, and log-loss and mAP (in per cent)
        of P and of P with one term or all, each with weights of its own; a term that is not used has none.
    """
    cells, observed = computed.columns[1], computed.observed
    known = observed != 0
    honest, labels = cells[known], observed[known] > 0
    figures: dict[str, float] = {}
    weights = None
    there = [column for column in range(cells.shape[-1]) if cells[..., column].any()]
    for name, columns in COMBINATIONS.items():
        if name in fusion_weights.TERMS and columns[-2] not in there:
            continue
        kept = torch.zeros(len(fusion_weights.TERMS), dtype=cells.dtype)
        kept[list(columns)] = 1
        weights = fusion_weights.fit(honest * kept, labels)
        if weights is None:
            return None, {}
        figures[f"fusion/log_loss_{name}"] = fusion_weights.log_loss(honest @ weights, labels)
        scores = torch.sigmoid(cells @ weights)
        figures[f"fusion/map_{name}"] = evaluate(scores, observed).mean_average_precision
    assert weights is not None
    return weights, figures | {
        f"fusion/weight_{fusion_weights.TERMS[column]}": float(weights[column]) for column in there
    }


def completed(
    forward: Callable[[Tensor], Output], classifier: FusedClassifier
) -> Callable[[Inputs], tuple[Tensor, Tensor, Tensor]]:
    """Return what gives Q and P [B, C] and N, L and R [B, C, 3] of training images; Q of a known cell is its label."""

    def answer(batch: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        query = rows_of(forward(batch.inputs), batch.observed, batch.indices, num_regions=classifier.num_regions)
        cells = fusion_weights.features(query.confidence, classifier.evidence(query))
        unified = torch.sigmoid(cells @ classifier.weights.to(cells.device)).float()
        known = torch.where(batch.observed == 0, unified, (batch.observed > 0).float())
        return known, query.confidence, cells[..., 1:4].float()

    return answer


def judge_completion(computed: Computed) -> dict[str, list[tuple[str, float]]]:
    """Return how right P and Q are on cells that the mask hides and the collection knows; nothing without such cells.

    mAP in per cent, log-loss, and the expected calibration error in ten bins of equal width.
    """
    hidden = (computed.observed == 0) & (computed.truth != 0)
    if not (hidden & (computed.truth > 0)).any():
        return {}
    truth = torch.where(hidden, computed.truth, 0)
    labels = (computed.truth[hidden] > 0).double()
    found = {}
    for who, scores in (("P", computed.columns[1]), ("Q", computed.columns[0])):
        own = scores[hidden].double().clamp(_LEAST, 1 - _LEAST)
        found[who] = [
            ("mAP", evaluate(scores, truth).mean_average_precision),
            ("log-loss", float(torch.nn.functional.binary_cross_entropy(own, labels))),
            ("calibration error", _calibration_error(own, labels)),
        ]
    return found


def _calibration_error(scores: Tensor, labels: Tensor) -> float:
    bins = (scores * _BINS).long().clamp_max(_BINS - 1)
    gap = torch.zeros(_BINS, dtype=scores.dtype).index_add(0, bins, scores - labels)
    return float(gap.abs().sum() / len(scores))


def build(
    forward: Callable[[Tensor], Output], materials: Materials, options: Options, ranks: Ranks
) -> FusedClassifier | None:
    """Return the fused classifier of a trained network, or None where no weight can be fitted. Collective.

    Its bank holds training images as the evaluation sees them, ``fusion.bank_size`` evenly drawn ones at most.

    Args:
        forward: of the network.
        materials: data and towers.
        options: the whole configuration.
        ranks: this process.
    """
    fusion, regions = options.fusion, num_regions(options)
    train = materials.plain("train", masked_by=options.data, at_most=fusion.bank_size)

    def rows(batch: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        found = asking(forward(batch.inputs), num_regions=regions)
        return found.embeddings, found.regions, found.choice

    found = train.compute(rows, ranks, with_ids=True)
    embeddings, shown, choice = found.columns
    nothing = embeddings[:, :0]
    bank = Neighbours(embeddings, found.observed, nothing, found.index, shown[:, :0], choice[:, :0])
    step = -(-len(found.index) // max(1, fusion.region_bank_size))
    some = slice(0, len(found.index) if regions else 0, step)
    region_bank = Neighbours(nothing, found.observed, nothing, found.index, shown, choice).at(some)
    uses = evidence.terms_used(fusion, num_classes=materials.card.num_classes, num_regions=regions)
    counts = CoCounts.of(found.observed if uses[1] else found.observed[:, :0])
    reference = Reference(bank, region_bank, LabelStatistics(counts, fusion.label_shrinkage, fusion.label_noise))
    prior = torch.tensor(fusion_weights.PRIOR, dtype=torch.float64)
    classifier = FusedClassifier(reference.to(ranks.device), prior, uses, found.ids)
    holdout = materials.plain("holdout", masked_by=options.data)
    weights, _ = judge(holdout.compute(terms(forward, classifier), ranks))
    return None if weights is None else replace(classifier, weights=weights)


def log_odds(classifier: FusedClassifier, output: Output) -> Tensor:
    """Return the fused logits [B, C] of images in no bank, of which no label is known."""
    return classifier.log_odds(asking(output, num_regions=classifier.num_regions))


def reasons(
    classifier: FusedClassifier, query: Neighbours, k: int, class_names: Sequence[str]
) -> list[list[dict[str, Any]]]:
    """Return for each of the rows that ask the k images of the bank with most weight, and what is known of them."""
    rows = classifier.reference.rows
    places, shares = evidence.nearest(rows, query, min(k, len(rows.indices)))
    told = []
    for own, weights in zip(places.tolist(), shares.tolist(), strict=True):
        near = []
        for place, weight in zip(own, weights, strict=True):
            labels = rows.observed[place].tolist()
            present, absent = (
                [name for name, label in zip(class_names, labels, strict=True) if label == sign] for sign in (1, -1)
            )
            near.append(
                {"id": classifier.names[place], "weight": round(weight, 4), "present": present, "absent": absent}
            )
        told.append(near)
    return told


def both(
    split: PlainSplit, forward: Callable[[Tensor], Output], classifier: FusedClassifier, ranks: Ranks
) -> tuple[Scores, Scores]:
    """Return the plain and the fused probabilities over a split, in one pass. Collective."""

    def answer(batch: Inputs) -> tuple[Tensor, Tensor]:
        output = forward(batch.inputs)
        return torch.sigmoid(output.logits).float(), torch.sigmoid(log_odds(classifier, output))

    computed = split.compute(answer, ranks)
    plain, fused = computed.columns
    return Scores(plain, computed.truth), Scores(fused, computed.truth)
