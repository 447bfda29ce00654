"""What other cells say of a cell: similar images (N), the image's other labels (L), similar regions of the class (R).

Each is a shift of log-odds against the class's prior, and leaves the cell's own label out everywhere: of the
neighbours, of the prior, of the correlations (method.md section 3.3). Shapes: B rows that ask, M of the bank, C
classes, D embedding, R regions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from scinet.fusion.bank import Neighbours
from scinet.options import FusionOptions
from scinet_kernels import gaussian_mass, gaussian_propagate, nearest_neighbours

MOST_CLASSES = 1024
"""Beyond, the label term, which solves C equations an image, is left out."""
INSTANCE_NEIGHBOURS, REGION_NEIGHBOURS = 16, 8
"""The bandwidth is the distance to the neighbour of this rank."""
INSTANCE_PRIOR, REGION_PRIOR = 2.0, 1.0
"""Weight of the class prior in a vote, in neighbours at distance 0."""

_LOGIT_RANGE = 1e-4
_LEAST_BANDWIDTH = 1e-3
_LABEL_RANGE = 2e-3
_SHARE_OF_UNKNOWN = (1e-3, 0.999)
_EIGENVALUE_FLOOR = 0.02


class Evidence(NamedTuple):
    """Shifts of log-odds N, L and R, each [B, C] fp32, or None where a term is not asked for."""

    instance: Tensor | None
    label: Tensor | None
    region: Tensor | None


class CoCounts(NamedTuple):
    """Of each pair of classes [C, C] fp32: samples with both known, with the first positive too, with both positive."""

    known: Tensor
    positive: Tensor
    both: Tensor

    @classmethod
    def of(cls, observed: Tensor) -> CoCounts:
        """Count in observed [M, C] in {+1, -1, 0}; exact up to 2^24 samples."""
        known, positive = (observed != 0).float(), (observed > 0).float()
        return cls(known.T @ known, positive.T @ known, positive.T @ positive)

    def without(self, observed: Tensor) -> CoCounts:
        """Return the counts without each of some samples: [B, C, C]."""
        known, positive = (observed != 0).float(), (observed > 0).float()
        own = (known.unsqueeze(2) * known.unsqueeze(1), positive.unsqueeze(2) * known.unsqueeze(1))
        return CoCounts(
            self.known - own[0], self.positive - own[1], self.both - positive.unsqueeze(2) * positive.unsqueeze(1)
        )

    def correlation(self, shrinkage: float) -> Tensor:
        """Return Pearson's correlation over pairwise known samples, shrunk to 0 where they are few; 0 of a constant."""
        known = self.known.clamp_min(1)
        first, second = self.positive / known, self.positive.mT / known
        variance = first * (1 - first) * second * (1 - second)
        correlation = (self.both / known - first * second) / variance.clamp_min(1e-9).sqrt()
        return torch.where(variance > 1e-9, correlation, 0.0) * self.known / (self.known + shrinkage).clamp_min(1e-9)


@dataclass(frozen=True)
class LabelStatistics:
    """What the labels of samples say of each other.

    Attributes:
        counts: of the labels.
        shrinkage: co-observations at which a correlation is halved.
        noise: variance of a known label.
    """

    counts: CoCounts
    shrinkage: float
    noise: float

    @cached_property
    def correlation(self) -> tuple[Tensor, float]:
        """Return the label correlation [C, C], made positive definite, and the factor that this took."""
        correlation = self.counts.correlation(self.shrinkage)
        correlation.fill_diagonal_(1)
        least = float(torch.linalg.eigvalsh(correlation.double())[0])
        factor = min(1.0, (1 - _EIGENVALUE_FLOOR) / (1 - least)) if least < 1 else 1.0
        scaled = factor * correlation
        scaled.fill_diagonal_(1)
        return scaled, factor


@dataclass(frozen=True)
class Reference:
    """What evidence is drawn from.

    Attributes:
        rows: [M, ...] whole images, labelled.
        regions: [M', ...] images whose regions are kept; none where R is 0.
        labels: statistics of the rows' labels, as they were when last taken.
    """

    rows: Neighbours
    regions: Neighbours
    labels: LabelStatistics

    def to(self, device: torch.device) -> Reference:
        """Return it on a device."""
        return replace(
            self,
            rows=Neighbours(*(column.to(device) for column in self.rows)),
            regions=Neighbours(*(column.to(device) for column in self.regions)),
            labels=replace(self.labels, counts=CoCounts(*(count.to(device) for count in self.labels.counts))),
        )


def prior_log_odds(rows: Neighbours, query: Neighbours) -> Tensor:
    """Return logit pi [B, C]: each class's known positive rate among the rows, without the own label.

    ``pi = (positives + 1/2) / (known + 1)``.
    """
    known, positive = (rows.observed != 0).sum(0), (rows.observed > 0).sum(0)
    own = query.observed * torch.isin(query.indices, rows.indices).unsqueeze(1)
    return _logit((positive - (own > 0).float() + 0.5) / (known - (own != 0).float() + 1))


def instance_evidence(rows: Neighbours, query: Neighbours) -> Tensor:
    """Return N [B, C]: how much the known labels of similar images move the log-odds.

    ``N = logit((sum_j S_ij Y_jc + a pi) / (sum_j S_ij K_jc + a)) - logit pi`` over the rows of other samples, with S
    Gaussian and the distance to the 16th neighbour as its bandwidth.
    """
    prior = prior_log_odds(rows, query)
    if not len(rows.indices):
        return torch.zeros_like(prior)
    values = torch.cat([rows.observed > 0, rows.observed != 0], 1).float()
    votes = _votes(query.embeddings, rows.embeddings, values, query.indices, rows.indices, rank=INSTANCE_NEIGHBOURS)
    positive, known = votes.chunk(2, dim=1)
    return _shift(positive, known, prior, INSTANCE_PRIOR)


def region_evidence(rows: Neighbours, query: Neighbours) -> Tensor:
    """Return R [B, C]: as N, but a class at a time, by its region of each image, over images where it is known."""
    prior = prior_log_odds(rows, query)
    shifts = []
    places = torch.arange(len(query.indices), device=prior.device)
    for label, own_prior in enumerate(prior.unbind(1)):
        known = rows.observed[:, label].nonzero().squeeze(1)
        if not len(known):
            shifts.append(torch.zeros_like(own_prior))
            continue
        queries = query.regions[places, query.choice[:, label].long()].float()
        keys = rows.regions[known, rows.choice[known, label].long()].float()
        positive = (rows.observed[known, label] > 0).float()
        values = torch.stack([positive, torch.ones_like(positive)], 1)
        votes = _votes(queries, keys, values, query.indices, rows.indices[known], rank=REGION_NEIGHBOURS)
        shifts.append(_shift(votes[:, 0], votes[:, 1], own_prior, REGION_PRIOR))
    return torch.stack(shifts, 1)


def nearest(rows: Neighbours, query: Neighbours, k: int) -> tuple[Tensor, Tensor]:
    """Return the k rows of other samples with most weight in N, and their shares of all weight.

    Returns:
        places [B, k] int64, the nearest first, and shares [B, k]; place -1 and share 0 where there are fewer.
    """
    keys = rows.embeddings
    rank = max(k, min(INSTANCE_NEIGHBOURS, len(keys)))
    places, squared = nearest_neighbours(
        query.embeddings, rank, keys=keys, query_ids=query.indices, key_ids=rows.indices
    )
    at_rank = squared[:, : min(INSTANCE_NEIGHBOURS, len(keys))]
    bandwidth = farthest_distance(at_rank)
    mass = gaussian_mass(
        query.embeddings, bandwidth=bandwidth, keys=keys, query_ids=query.indices, key_ids=rows.indices
    )
    log_weight = -squared[:, :k] / (2 * bandwidth.square().unsqueeze(1))
    return places[:, :k], (log_weight - mass.unsqueeze(1)).exp()


def label_evidence(reference: Reference, query: Neighbours) -> Tensor:
    """Return L [B, C]: the linear conditional expectation of a label given the image's other cells.

    A known cell is an observation of its label with variance ``noise``; the teacher's probability of an unknown one is
    an observation as uncertain as it leaves the label: of variance ``v / (1 - v)``, ``v = p (1 - p) / (pi (1 - pi))``
    (ours). With correlation K, observations x and variances V the expectation without the own cell is
    ``x - (K + V)^-1 x / diag (K + V)^-1``.

    Args:
        reference: the labels that the correlation comes from.
        query: whose confidence is the probability P.

    Source: method.md sections 3 and 3.3; leave-one-out kriging.
    """
    labels = reference.labels
    correlation, factor = labels.correlation
    known = query.observed != 0
    label = (query.observed > 0).float()
    rate = _rate(labels.counts, torch.zeros_like(query.observed[:1]))
    spread = (rate * (1 - rate)).sqrt()
    likely = query.confidence
    share = (likely * (1 - likely) / spread.square()).clamp(*_SHARE_OF_UNKNOWN)
    variance = torch.where(known, labels.noise, share / (1 - share))
    seen = torch.where(known, label - rate, (likely - rate) / (1 - share)) / spread
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(correlation + torch.diag_embed(variance)))
    solved = (inverse @ seen.unsqueeze(2)).squeeze(2)
    ratio = solved / inverse.diagonal(dim1=1, dim2=2)
    expected = seen - ratio
    own = query.observed * torch.isin(query.indices, reference.rows.indices).unsqueeze(1)
    mine = own.any(1).nonzero().squeeze(1)
    if len(mine):
        # rows of the correlation without the own image, for the cells that have a label of their own in it
        rows = labels.counts.without(own[mine]).correlation(labels.shrinkage) * factor
        rows.diagonal(dim1=1, dim2=2).zero_()
        weights = solved[mine].unsqueeze(1) - inverse[mine] * ratio[mine].unsqueeze(2)
        expected[mine] = torch.where(own[mine] != 0, (rows * weights).sum(2), expected[mine])
    own_rate = _rate(labels.counts, own)
    own_spread = (own_rate * (1 - own_rate)).sqrt()
    return _logit((own_rate + own_spread * expected).clamp(_LABEL_RANGE, 1 - _LABEL_RANGE)) - _logit(own_rate)


def _rate(counts: CoCounts, own: Tensor) -> Tensor:
    """Return pi [B, C] without the own labels [B, C]."""
    known = counts.known.diagonal() - (own != 0).float()
    positive = counts.both.diagonal() - (own > 0).float()
    return ((positive + 0.5) / (known + 1)).clamp(_LOGIT_RANGE, 1 - _LOGIT_RANGE)


def farthest_distance(squared: Tensor) -> Tensor:
    """Return the distance [B] to the farthest of the neighbours at squared distances [B, K], infinite where missing."""
    return torch.where(squared.isinf(), 0.0, squared).amax(1).sqrt().clamp_min(_LEAST_BANDWIDTH)


def terms_used(options: FusionOptions, *, num_classes: int, num_regions: int) -> tuple[bool, bool, bool]:
    """Return which of N, L and R there are."""
    return options.instance_evidence, options.label_evidence and num_classes <= MOST_CLASSES, num_regions > 0


def _votes(queries: Tensor, keys: Tensor, values: Tensor, query_ids: Tensor, key_ids: Tensor, *, rank: int) -> Tensor:
    """Return the sum of the values [M, V] of keys of other samples under a Gaussian: [B, V].

    Its bandwidth is the distance to the rank-th nearest key, or to the farthest where there are fewer.
    """
    with torch.no_grad():
        _, squared = nearest_neighbours(queries, min(rank, len(keys)), keys=keys, query_ids=query_ids, key_ids=key_ids)
        farthest = farthest_distance(squared)
    mass = gaussian_mass(queries, bandwidth=farthest, keys=keys, query_ids=query_ids, key_ids=key_ids)
    mean = gaussian_propagate(queries, values, bandwidth=farthest, keys=keys, query_ids=query_ids, key_ids=key_ids)
    return mean * mass.exp().unsqueeze(1)


def _shift(positive: Tensor, known: Tensor, prior: Tensor, strength: float) -> Tensor:
    return _logit((positive + strength * torch.sigmoid(prior)) / (known + strength)) - prior


def _logit(probability: Tensor) -> Tensor:
    return torch.logit(probability.clamp(_LOGIT_RANGE, 1 - _LOGIT_RANGE))
