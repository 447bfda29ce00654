"""The unified confidence Q: instance similarity and label correlation fused into one matrix (method.md section 3).

Shapes: B rows of this rank, G of the global batch, M of the bank, C classes, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from scinet.errors import ConfigError
from scinet.fusion import weights as fusion_weights
from scinet.fusion.bank import Bank, Neighbours, blank
from scinet.fusion.classifier import FusedClassifier
from scinet.fusion.correlation import LabelCorrelation
from scinet.fusion.evidence import (
    CoCounts,
    Evidence,
    LabelStatistics,
    Reference,
    farthest_distance,
    prior_log_odds,
    terms_used,
)
from scinet.model.label_graph import propagation
from scinet.options import Bandwidth, Combine, CorrelationOptions, FusionOptions, Memory, Weights
from scinet_kernels import gaussian_propagate, nearest_neighbours

_SMALLEST_PROBABILITY = 1e-3
_CONDITIONAL_RANGE = (0.002, 0.998)
_DROPPED_VARIANCE = 1e4
_MOST_HIDDEN = 10.0  # positives that a known one may stand for
_LARGEST_RATE = 0.9


class Confidence(NamedTuple):
    """Q and its parts P, N, L and R, each [B, C] fp32; a part that is switched off is None."""

    unified: Tensor
    teacher: Tensor
    instance: Tensor | None
    label: Tensor | None
    region: Tensor | None = None


class _Counting(NamedTuple):
    """pi [C], classes whose unknown cells count as negatives [C] bool, and the votes of a known positive [C]."""

    rate: Tensor
    lacking: Tensor
    weight: Tensor


class Fusion:
    """Forms Q for this rank's rows from the global batch and the bank, and keeps the state equal on every rank."""

    def __init__(
        self,
        options: FusionOptions,
        correlation_options: CorrelationOptions,
        text: Tensor,
        *,
        width: int,
        num_regions: int = 0,
        num_samples: int,
        samples_per_epoch: int,
    ) -> None:
        """Allocate the state.

        Args:
            options: the ``fusion`` section.
            correlation_options: the ``correlation`` section.
            text: [C, C] correlation of the text embeddings.
            width: D.
            num_regions: R, 0 where none are kept.
            num_samples: size of the sample index, for the dense memory.
            samples_per_epoch: N of the training split.

        Raises:
            ConfigError: if the dense memory would exceed its budget.
        """
        self.options, self._correlation_options = options, correlation_options
        is_linear = options.combine is Combine.linear
        self.correlation = LabelCorrelation(
            text, correlation_options, samples_per_epoch=samples_per_epoch, needs_confidence=is_linear
        )
        num_classes = len(text)
        device = text.device
        self.is_fitted = options.enabled and options.weights is Weights.fitted
        rows = blank(
            options.bank_size if options.enabled else 0,
            num_classes,
            width,
            confidence=num_classes if is_linear else 0,
            device=device,
        )
        self.bank = Bank(rows, num_samples=num_samples, is_ring=not self.is_fitted)
        size = options.region_bank_size if num_regions else 0
        regions = blank(size, num_classes, width, regions=num_regions, device=device)
        self._region_bank = Bank(regions._replace(embeddings=regions.embeddings[:, :0]), num_samples=num_samples)
        self.num_regions = num_regions
        self.weights = torch.tensor(fusion_weights.PRIOR, dtype=torch.float64)
        """Of ``weights.TERMS``; set by the evaluation on the hold-out, where ``is_fitted``."""
        self._uses = terms_used(options, num_classes=num_classes, num_regions=num_regions)
        self._has_counts = self.is_fitted and self._uses[1]
        self._take_counts(rows.observed[:0])
        self._memory = self._allocate_memory(num_samples, num_classes, text.device)

    def _allocate_memory(self, num_samples: int, num_classes: int, device: torch.device) -> Tensor | None:
        if self.options.memory is Memory.none or not self.options.enabled:
            return None
        megabytes = num_samples * num_classes * 4 / 2**20
        if megabytes > self.options.memory_budget_mb:
            needed = f"fusion.memory=dense needs {megabytes:.0f} MiB for {num_samples} samples x {num_classes} classes"
            raise ConfigError(
                f"{needed}, more than fusion.memory_budget_mb={self.options.memory_budget_mb}: raise it, or set "
                "fusion.memory=none fusion.momentum=0"
            )
        # fp16 would do for targets, but its rounding makes 1e-7 between two numbers of ranks into 5e-4
        return torch.full((num_samples, num_classes), torch.nan, device=device)

    def combine(self, batch: Neighbours, probabilities: Tensor, everyone: Neighbours) -> Confidence:
        """Return the confidence of this rank's rows; changes no state.

        Args:
            batch: this rank's rows; embeddings are the teacher's, on unit length.
            probabilities: P [B, C], the teacher's.
            everyone: the rows of the global batch, this rank's included.
        """
        observed = batch.observed
        if not self.options.enabled:
            return Confidence(_override(probabilities, observed), probabilities, None, None)
        raw: Tensor
        instance: Tensor | None
        label: Tensor | None
        if self.is_fitted:
            raw, parts = self._fitted(batch)
            return Confidence(_override(self._remembered(batch, raw), observed), probabilities, *parts)
        if self.options.combine is Combine.linear:
            raw, instance, label = self._linear(batch, probabilities, everyone)
        else:
            raw, instance, label = self._evidence(batch, probabilities, everyone)
        return Confidence(_override(self._remembered(batch, raw), observed), probabilities, instance, label)

    def _remembered(self, batch: Neighbours, raw: Tensor) -> Tensor:
        """Return the confidence [B, C] mixed with what is remembered of the samples."""
        if self._memory is None:
            return raw
        previous = self._memory[batch.indices]
        mixed = self.options.momentum * previous + (1 - self.options.momentum) * raw
        return torch.where(previous.isnan(), raw, mixed)

    def target(self, unified: Tensor) -> Tensor:
        """Return what the student is taught of Q [B, C]: its log-odds times ``fusion.target_sharpness``."""
        sharpness = self.options.target_sharpness
        if sharpness == 1:
            return unified
        return torch.where((unified > 0) & (unified < 1), torch.sigmoid(sharpness * torch.logit(unified)), unified)

    def update(self, everyone: Neighbours) -> None:
        """Take the global batch, in global order and with its confidence, into moments, memory and bank."""
        self.correlation.update(everyone.observed, everyone.confidence)
        self.bank.append(everyone)
        self._region_bank.append(everyone)
        if self._memory is not None:
            self._memory[everyone.indices] = everyone.confidence

    def classifier(self) -> FusedClassifier:
        """Return what the bank and the weights say as they are now; only where ``is_fitted``."""
        reference = Reference(self.bank.rows(), self._region_bank.rows(), self._labels)
        return FusedClassifier(reference, self.weights, self._uses)

    def refresh(self) -> None:
        """Take the correlation of the labels from the bank as it is now."""
        self._take_counts(self.bank.rows().observed)

    def _take_counts(self, observed: Tensor) -> None:
        self._set_counts(CoCounts.of(observed if self._has_counts else observed[:, :0]))

    def _set_counts(self, counts: CoCounts) -> None:
        self._labels = LabelStatistics(counts, self.options.label_shrinkage, self.options.label_noise)

    def _fitted(self, batch: Neighbours) -> tuple[Tensor, list[Tensor | None]]:
        """Return Q of unknown cells, and N, L and R as probabilities; a term of weight 0 costs nothing."""
        classifier = self.classifier()
        evidence = Evidence(None, None, None)
        if len(self.bank):
            evidence = classifier.evidence(batch, only_weighty=True)
        cells = fusion_weights.features(batch.confidence, evidence)
        raw = torch.sigmoid(cells @ self.weights.to(cells.device)).float()
        prior = prior_log_odds(classifier.reference.rows, batch)
        return raw, [None if shift is None else torch.sigmoid(prior + shift) for shift in evidence]

    def _evidence(
        self, batch: Neighbours, probabilities: Tensor, everyone: Neighbours
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Combine on the log-odds scale what the teacher, similar images and the image's own labels say.

        ``evidence`` adds the neighbours' log-odds to the teacher's as if the two were independent. They are not: the
        teacher has learnt from the same known labels. ``pool`` (ours) takes their weighted mean instead, a logarithmic
        opinion pool, in which neighbours without a known label have no say, and adds only the label term: the targets
        are then better calibrated (configs/compare/README.md).
        """
        counting = self._count(everyone)
        rate = counting.rate
        prior = torch.logit(rate)
        score = torch.logit(probabilities.clamp(_SMALLEST_PROBABILITY, 1 - _SMALLEST_PROBABILITY))
        instance = label = None
        if self.options.instance_weight:
            instance, say = self._neighbour_vote(batch, everyone, counting)
            if self.options.combine is Combine.pool:
                weight = self.options.instance_weight * say
                score = (score + weight * _clamped_logit(instance)) / (1 + weight)
            else:
                score = score + self.options.instance_weight * (_clamped_logit(instance) - prior)
        if self.options.label_weight:
            correlation = self.correlation.known_correlation(self.options.label_shrinkage)
            label = conditional_expectation(correlation, rate, batch.observed, noise=self.options.label_noise)
            score = score + self.options.label_weight * (_clamped_logit(label) - prior)
        return torch.sigmoid(score), instance, label

    def _count(self, everyone: Neighbours) -> _Counting:
        """Return how labels count as evidence, class by class.

        A class without a known negative (single positives, tags) would have the rate 1 wherever it is known. There an
        unknown cell counts as a negative, and a known positive for all those that it stands for: as many as the teacher
        sees in the batch for each that is known, alike for all such classes.
        """
        rate, share = self.correlation.positive_rate(), self.correlation.positive_share()
        lacking = self.correlation.lacks_negatives()
        seen, known = (torch.where(lacking, part, 0.0).sum() for part in (everyone.confidence.mean(0), share))
        hidden = (seen / known.clamp_min(1e-6)).clamp(1.0, _MOST_HIDDEN)
        assumed = (hidden * share).clamp(_SMALLEST_PROBABILITY, _LARGEST_RATE)
        return _Counting(torch.where(lacking, assumed, rate), lacking, torch.where(lacking, hidden, 1.0))

    def _neighbour_vote(self, batch: Neighbours, everyone: Neighbours, counting: _Counting) -> tuple[Tensor, Tensor]:
        """Return N, what the known labels of similar images say, and their share of it, both [B, C].

        The rest of N is the class prior, which has ``prior_strength`` votes.
        """
        rows = self._candidates(everyone)
        known = ((rows.observed != 0) | counting.lacking).float()
        positive = (rows.observed > 0) * counting.weight
        votes, mass = self._propagate(batch, rows, torch.cat([positive, known], dim=1)).chunk(2, dim=1)
        strength = self.options.prior_strength
        return (votes + strength * counting.rate) / (mass + strength), mass / (mass + strength)

    def _linear(self, batch: Neighbours, probabilities: Tensor, everyone: Neighbours) -> tuple[Tensor, Tensor, Tensor]:
        rows = self._candidates(everyone)
        instance = self._propagate(batch, rows, rows.confidence)
        has_neighbour = self._propagate(batch, rows, torch.ones_like(rows.confidence[:, :1])) > 0
        instance = torch.where(has_neighbour, instance, probabilities)
        options = self._correlation_options
        label = probabilities @ propagation(self.correlation.shrunk(), options.graph_top_k, options.temperature).T
        l_n, l_q = self.options.instance_weight, self.options.label_weight
        return (probabilities + l_n * instance + l_q * label) / (1 + l_n + l_q), instance, label

    def _candidates(self, everyone: Neighbours) -> Neighbours:
        past = self.bank.rows()
        # a bank without confidence (evidence) has no columns there
        everyone = everyone._replace(confidence=everyone.confidence[:, : past.confidence.shape[1]])
        return Neighbours(*(torch.cat(pair) for pair in zip(everyone, past, strict=True)))

    def _propagate(self, batch: Neighbours, rows: Neighbours, values: Tensor) -> Tensor:
        if not len(rows.indices):
            return batch.embeddings.new_zeros(len(batch.embeddings), values.shape[1])
        bandwidth: float | Tensor = self.options.bandwidth_value
        if self.options.bandwidth is Bandwidth.adaptive:
            k = min(self.options.bandwidth_neighbours, len(rows.indices))
            _, squared = nearest_neighbours(
                batch.embeddings, k, keys=rows.embeddings, query_ids=batch.indices, key_ids=rows.indices
            )
            bandwidth = farthest_distance(squared)
        # unit vectors are never farther apart than 2, and a radius costs a comparison a pair
        radius = self.options.radius if self.options.radius < 2 else None
        return gaussian_propagate(
            batch.embeddings,
            values,
            bandwidth=bandwidth,
            keys=rows.embeddings,
            query_ids=batch.indices,
            key_ids=rows.indices,
            radius=radius,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return bank, moments and memory."""
        state = {f"bank.{key}": value for key, value in self.bank.state_dict().items()}
        state |= {f"correlation.{key}": value for key, value in self.correlation.state_dict().items()}
        state |= {} if self._memory is None else {"memory": self._memory}
        if self.is_fitted:
            state["weights"] = self.weights
            if self.num_regions:
                state |= {f"regions.{key}": value for key, value in self._region_bank.state_dict().items()}
            if self._has_counts:
                state |= {f"counts.{key}": value for key, value in self._labels.counts._asdict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the state of another instance of the same sizes."""
        parts: dict[str, Bank | LabelCorrelation] = {"bank.": self.bank, "correlation.": self.correlation}
        if self.is_fitted:
            if self.num_regions:
                parts["regions."] = self._region_bank
            self.weights = state["weights"].clone()
            if self._has_counts:
                self._set_counts(CoCounts(*(state[f"counts.{name}"].clone() for name in CoCounts._fields)))
        for prefix, part in parts.items():
            part.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        if self._memory is not None:
            self._memory.copy_(state["memory"])


def conditional_expectation(correlation: Tensor, rate: Tensor, observed: Tensor, *, noise: float) -> Tensor:
    """Return L, the linear conditional expectation of each label given the image's known labels.

    ``L_i = pi + s R (R + V_i)^-1 z_i`` with ``z = (Y - pi) / s`` on known cells and V so large elsewhere that unknown
    cells drop out.

    Args:
        correlation: R [C, C], positive definite.
        rate: pi [C].
        observed: [B, C] in {+1, -1, 0}.
        noise: V of a known cell.

    Returns:
        [B, C] fp32 in [0.002, 0.998] (widened to the rate, where it lies beyond); ``rate`` for an image
        without a known label.

    Source: method.md section 3 (ours).
    """
    known = observed != 0
    spread = (rate * (1 - rate)).sqrt()
    standardised = torch.where(known, ((observed > 0).float() - rate) / spread, 0.0)
    variance = torch.where(known, noise, _DROPPED_VARIANCE)
    factor = torch.linalg.cholesky(correlation + torch.diag_embed(variance))
    solved = torch.cholesky_solve(standardised.unsqueeze(-1), factor).squeeze(-1)
    # a rate beyond the range widens it: without a known label the expectation is the rate, and no evidence
    low, high = rate.clamp_max(_CONDITIONAL_RANGE[0]), rate.clamp_min(_CONDITIONAL_RANGE[1])
    return (rate + spread * (solved @ correlation.T)).clamp(low, high)


def _override(probabilities: Tensor, observed: Tensor) -> Tensor:
    return torch.where(observed == 0, probabilities, (observed > 0).to(probabilities.dtype))


def _clamped_logit(probabilities: Tensor) -> Tensor:
    return torch.logit(probabilities.clamp(_SMALLEST_PROBABILITY, 1 - _SMALLEST_PROBABILITY))
