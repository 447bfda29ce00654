"""From the outputs of student and teacher to the loss (method.md sections 4, 5 and 7).

Every part is a sum over classes and this rank's samples, divided by the samples of the global batch, so that the sum
over ranks is the loss of the global batch. Rows without a sample (``Batch.valid``) weigh nothing and reach no state.
Shapes: B rows of this rank, G of the global batch, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scinet.data.batch import Batch
from scinet.distributed import Ranks, gather_rows
from scinet.fusion.bank import Neighbours
from scinet.fusion.confidence import Confidence, Fusion
from scinet.fusion.thresholds import DynamicThresholds
from scinet.losses.supervised import binary_cross_entropy, focal_margin
from scinet.model.label_graph import propagation
from scinet.model.network import Output
from scinet.options import LossOptions, Method, Options, Profile

_FLIP_PROBABILITY = 0.6


class Pseudo(NamedTuple):
    """Hard labels of one view [B, C], the images they hold for [B], and the unknown cells made positive [B, C]."""

    labels: Tensor
    confident: Tensor
    positive: Tensor


@dataclass(frozen=True)
class Step:
    """One micro-batch's loss and what it was made of; the parts are detached sums over this rank.

    ``everyone`` and ``passed`` [G, C] hold the samples of all ranks in global order, and no row without a sample.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    confidence: Confidence | None
    pseudo: Pseudo | None
    everyone: Neighbours | None
    passed: Tensor | None


@dataclass(frozen=True)
class Phase:
    """Where in the run a step lies."""

    is_warm: bool
    epoch: int


class Objective:
    """The loss of SCINet, either profile, or of a baseline."""

    def __init__(self, options: Options, fusion: Fusion | None, thresholds: DynamicThresholds, ranks: Ranks) -> None:
        """Take the state that SCINet's targets need; the baselines need none."""
        self._options, self._fusion, self._thresholds, self._ranks = options, fusion, thresholds, ranks

    def __call__(self, student: Output, teacher: Output | None, batch: Batch, phase: Phase, size: float) -> Step:
        """Return the loss of a micro-batch. Collective for SCINet.

        Args:
            student: outputs on all views, [V * B].
            teacher: the EMA teacher's on its view, [B]; None for a baseline.
            batch: labels and indices.
            phase: position in the run.
            size: samples of the global batch over the accumulation steps, by which sums are divided.
        """
        observed = batch.observed
        has_gaps = size < len(observed) * self._ranks.world_size
        if self._options.method is not Method.scinet or teacher is None or self._fusion is None:
            assumes = self._options.method is Method.assume_negative
            weights = torch.ones_like(student.logits) if assumes else (observed != 0).float()
            weights = weights * batch.valid.unsqueeze(1)
            total = binary_cross_entropy(student.logits, (observed > 0).float(), weights) / size
            return Step(total, {"supervised": total.detach()}, None, None, None, None)
        views = student.logits.chunk(3)
        confidence, everyone = self._confidence(student, teacher, batch, has_gaps=has_gaps)
        parts, pseudo = self._parts(views, confidence.unified, batch, phase)
        loss = self._options.loss
        total = parts["supervised"] + loss.unlabelled_weight * (
            parts["consistency_weak"] + parts["consistency_medium"] + loss.distillation_weight * parts["distillation"]
        )
        passed = gather_rows(pseudo.positive, self._ranks)
        if has_gaps:
            passed = passed[gather_rows(batch.valid, self._ranks)]
        return Step(
            total / size,
            {name: part.detach() / size for name, part in parts.items()},
            confidence,
            pseudo,
            everyone,
            passed,
        )

    def _confidence(
        self, student: Output, teacher: Output, batch: Batch, *, has_gaps: bool
    ) -> tuple[Confidence, Neighbours]:
        """Return Q of this rank's rows, and the global batch's rows with their Q for the update afterwards."""
        assert self._fusion is not None
        options = self._options
        probabilities = torch.sigmoid(teacher.logits)
        mine = Neighbours(teacher.embeddings, batch.observed, probabilities, batch.index)
        everyone = Neighbours(*(gather_rows(column, self._ranks) for column in mine))
        is_sample = everyone.indices >= 0
        if has_gaps:  # asked for by the size alone: the mask costs a wait for the device
            everyone = Neighbours(*(column[is_sample] for column in everyone))
        if options.profile is Profile.release:
            correlation = options.correlation
            graph = propagation(self._fusion.correlation.shrunk(), correlation.graph_top_k, correlation.temperature)
            confidence = Confidence(probabilities @ graph.T, probabilities, None, None)
        elif options.fusion.differentiable:
            medium = student.embeddings.chunk(3)[1]
            confidence = self._fusion.combine(mine._replace(embeddings=medium), probabilities, everyone)
        else:
            with torch.no_grad():
                confidence = self._fusion.combine(mine, probabilities, everyone)
        unified = gather_rows(confidence.unified.detach(), self._ranks)
        return confidence, everyone._replace(confidence=unified[is_sample] if has_gaps else unified)

    def _parts(
        self, views: tuple[Tensor, ...], unified: Tensor, batch: Batch, phase: Phase
    ) -> tuple[dict[str, Tensor], Pseudo]:
        weak, medium, strong = views
        observed, valid = batch.observed, batch.valid.unsqueeze(1)
        pseudo_weak = Pseudo(*self._thresholds.pseudo_labels(torch.sigmoid(weak.detach()), observed))
        pseudo_medium = Pseudo(*self._thresholds.pseudo_labels(torch.sigmoid(medium.detach()), observed))
        rows_weak, rows_medium = (
            (p.confident.unsqueeze(1) & valid).float().expand_as(weak) for p in (pseudo_weak, pseudo_medium)
        )
        is_on = float(phase.is_warm)
        return {
            "supervised": self._supervised(weak, unified.detach(), batch, phase),
            "consistency_weak": is_on * binary_cross_entropy(medium, pseudo_weak.labels, rows_weak),
            "consistency_medium": is_on * binary_cross_entropy(strong, pseudo_medium.labels, rows_medium),
            "distillation": is_on * binary_cross_entropy(strong, unified, rows_medium),
        }, pseudo_weak._replace(positive=pseudo_weak.positive & valid)

    def _supervised(self, logits: Tensor, unified: Tensor, batch: Batch, phase: Phase) -> Tensor:
        loss: LossOptions = self._options.loss
        observed = batch.observed
        known = observed != 0
        if self._options.profile is Profile.release:
            is_flipped = (torch.sigmoid(logits.detach()) > _FLIP_PROBABILITY) & (phase.epoch > 0)
            targets = torch.where(known, observed > 0, is_flipped).float()
            weights = torch.ones_like(logits)
        else:
            soft = loss.soft_target_weight * (2 * unified - 1).abs() * float(phase.is_warm)
            targets = torch.where(known, (observed > 0).float(), unified)
            weights = torch.where(known, 1.0, soft)
        weights = weights * batch.valid.unsqueeze(1)
        return focal_margin(logits, targets, weights, gamma=loss.focal_gamma, margin=loss.margin)
