"""From the outputs of student and teacher to the loss (method.md sections 4, 5 and 7).

Every part is a sum over classes and this rank's samples, divided by the samples of the global batch, so that the sum
over ranks is the loss of the global batch. Rows without a sample (``Batch.valid``) weigh nothing and reach no state.
Shapes: B rows of this rank, G of the global batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from scinet.data.batch import Batch
from scinet.distributed import Gathering, Ranks, start_gather
from scinet.fusion.bank import Neighbours, rows_of
from scinet.fusion.confidence import Confidence, Fusion
from scinet.fusion.thresholds import DynamicThresholds
from scinet.losses.supervised import binary_cross_entropy, focal_margin
from scinet.model.label_graph import propagation
from scinet.model.network import Output
from scinet.options import LossOptions, Options, Profile
from scinet.stopwatch import Stopwatch

_FLIP_PROBABILITY = 0.6
_TEACHER_VIEW = {Profile.paper: 1, Profile.release: 2}

Forward = Callable[[Tensor], Output]


class Pseudo(NamedTuple):
    """Hard labels of one view [B, C], the images they hold for [B], and the unknown cells made positive [B, C]."""

    labels: Tensor
    confident: Tensor
    positive: Tensor


@dataclass(frozen=True)
class Step:
    """One micro-batch's loss and what it was made of; the parts are detached sums over this rank."""

    loss: Tensor
    parts: dict[str, Tensor]
    confidence: Confidence | None
    pseudo: Pseudo | None


@dataclass(frozen=True)
class Phase:
    """Where in the run a step lies."""

    is_warm: bool
    epoch: int


class Look:
    """What the teacher sees in the global batch of a step, before the student does.

    Its rows travel to all ranks while the student computes, so that every micro-batch is fused with the whole global
    batch, whatever the number of ranks and accumulation steps.
    """

    def __init__(
        self,
        teacher: Sequence[Output],
        micro: Sequence[Batch],
        ranks: Ranks,
        *,
        has_gaps: bool,
        num_regions: int = 0,
    ) -> None:
        """Take the teacher's outputs on this rank's micro-batches, and send them off. Collective."""
        self.mine = [
            rows_of(output, batch.observed, batch.index, num_regions=num_regions)
            for output, batch in zip(teacher, micro, strict=True)
        ]
        self._ranks, self._has_gaps = ranks, has_gaps
        self._sent = start_gather(Neighbours(*map(torch.cat, zip(*self.mine, strict=True))), ranks)
        self._answers: list[Gathering] = []

    @cached_property
    def _arrived(self) -> tuple[Neighbours, Tensor]:
        """The rows of all ranks in global order without those that hold no sample, and which rows these were."""
        everyone = Neighbours(*self._sent.rows())
        is_sample = everyone.indices >= 0
        if self._has_gaps:  # asked for by the size alone: the mask costs a wait for the device
            everyone = everyone.at(is_sample)
        return everyone, is_sample

    @property
    def everyone(self) -> Neighbours:
        """The rows of all ranks in global order [G, ...]; their confidence is the teacher's probability."""
        return self._arrived[0]

    def answer(self, unified: Tensor, passed: Tensor) -> None:
        """Send off Q [B, C] and the pseudo-positives [B, C] of the next micro-batch. Collective."""
        self._answers.append(start_gather((unified, passed), self._ranks))

    def answers(self) -> tuple[Neighbours, Tensor]:
        """Return the global batch with its Q, and its pseudo-positives [G, C], once every micro-batch has answered."""
        everyone, is_sample = self._arrived
        unified, passed = (torch.cat(parts) for parts in zip(*(sent.rows() for sent in self._answers), strict=True))
        if self._has_gaps:
            unified, passed = unified[is_sample], passed[is_sample]
        return everyone._replace(confidence=unified), passed


class Aim(Protocol):
    """What the training loop asks of SCINet's objective and of the zoo's alike."""

    def look(self, micro: Sequence[Batch], teacher: Forward, student: Forward, *, has_gaps: bool) -> Any:
        """Return what the losses of a step will see of its global batch, or None. Collective."""
        ...

    def __call__(self, student: Output, batch: Batch, phase: Phase, size: float, look: Any, place: int) -> Step:
        """Return the loss of a micro-batch. Collective.

        Args:
            student: outputs on the method's views, [V * B].
            batch: labels and indices.
            phase: position in the run.
            size: samples of the global batch over the accumulation steps, by which sums are divided.
            look: at the global batch.
            place: of this micro-batch among those that the look was given.
        """
        ...

    def update(self, look: Any, phase: Phase) -> None:
        """Take a step, which was sound, into the state that later ones depend on. Collective."""
        ...

    def end_epoch(self, epoch: int) -> None:
        """Change the state at the end of an epoch, counted from 0, whether or not its last step was taken."""
        ...

    def fusion_seconds(self) -> list[float]:
        """Return the times of the fusions that have ended since the last call."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return that state."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the state of another instance of the same sizes."""
        ...


class Objective:
    """The loss of SCINet, either profile."""

    def __init__(self, options: Options, fusion: Fusion, thresholds: DynamicThresholds, ranks: Ranks) -> None:
        """Take the state that SCINet's targets need."""
        self._options, self._ranks = options, ranks
        self.fusion, self.thresholds = fusion, thresholds
        self._fusing = Stopwatch(ranks.device)

    def look(self, micro: Sequence[Batch], teacher: Forward, student: Forward, *, has_gaps: bool) -> Look:
        """Let the teacher see the whole global batch. Collective."""
        view = _TEACHER_VIEW[self._options.profile]
        outputs = [teacher(batch.inputs.chunk(3)[view]) for batch in micro]
        return Look(outputs, micro, self._ranks, has_gaps=has_gaps, num_regions=self.fusion.num_regions)

    def __call__(self, student: Output, batch: Batch, phase: Phase, size: float, look: Look, place: int = 0) -> Step:
        """Return the loss of a micro-batch. Collective."""
        views = student.logits.chunk(3)
        everyone = look.everyone  # waited for before the fusion's time begins
        with self._fusing:
            confidence = self._confidence(self.fusion, student, look.mine[place], everyone)
        parts, pseudo = self._parts(views, self.fusion.target(confidence.unified), batch, phase)
        look.answer(confidence.unified, pseudo.positive)
        loss = self._options.loss
        total = parts["supervised"] + loss.unlabelled_weight * (
            loss.medium_view_weight * parts["consistency_weak"]
            + loss.strong_view_weight * parts["consistency_medium"]
            + loss.distillation_weight * parts["distillation"]
        )
        return Step(total / size, {name: part.detach() / size for name, part in parts.items()}, confidence, pseudo)

    def update(self, look: Look, phase: Phase) -> None:
        """Take the global batch into correlation, bank, memory and thresholds. Collective."""
        everyone, passed = look.answers()
        with self._fusing:
            self.fusion.update(everyone)
            self.thresholds.update(passed)

    def end_epoch(self, epoch: int) -> None:
        """Change nothing."""

    def fusion_seconds(self) -> list[float]:
        """Return the times of the fusions that have ended since the last call."""
        return self._fusing.take()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of fusion and thresholds."""
        parts = {"fusion": self.fusion.state_dict(), "thresholds": self.thresholds.state_dict()}
        return {f"{who}/{name}": value for who, state in parts.items() for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the state of another instance of the same sizes."""
        for who, part in (("fusion/", self.fusion), ("thresholds/", self.thresholds)):
            part.load_state_dict({k.removeprefix(who): value for k, value in state.items() if k.startswith(who)})

    def _confidence(self, fusion: Fusion, student: Output, mine: Neighbours, everyone: Neighbours) -> Confidence:
        """Return Q of this rank's rows."""
        options = self._options
        probabilities = mine.confidence
        if options.profile is Profile.release:
            correlation = options.correlation
            graph = propagation(fusion.correlation.shrunk(), correlation.graph_top_k, correlation.temperature)
            return Confidence(probabilities @ graph.T, probabilities, None, None)
        if options.fusion.differentiable:
            medium = student.embeddings.chunk(3)[1]
            return fusion.combine(mine._replace(embeddings=medium), probabilities, everyone)
        with torch.no_grad():
            return fusion.combine(mine, probabilities, everyone)

    def _parts(
        self, views: tuple[Tensor, ...], unified: Tensor, batch: Batch, phase: Phase
    ) -> tuple[dict[str, Tensor], Pseudo]:
        weak, medium, strong = views
        observed, valid = batch.observed, batch.valid.unsqueeze(1)
        pseudo_weak = Pseudo(*self.thresholds.pseudo_labels(torch.sigmoid(weak.detach()), observed))
        pseudo_medium = Pseudo(*self.thresholds.pseudo_labels(torch.sigmoid(medium.detach()), observed))
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
            # ours: where nothing is known to be absent, all could be present; unknown cells are pulled down a little
            lacking = self.fusion.correlation.lacks_negatives()
            soft = torch.where(lacking, loss.assumed_soft_weight, 1.0) * soft
            down = torch.where(lacking, loss.assumed_negative_weight, 0.0)
            pulled = torch.where(lacking, soft * unified / (soft + down).clamp_min(1e-12), unified)
            targets = torch.where(known, (observed > 0).float(), pulled)
            weights = torch.where(known, 1.0, soft + down)
        weights = weights * batch.valid.unsqueeze(1)
        return focal_margin(logits, targets, weights, gamma=loss.focal_gamma, margin=loss.margin)
