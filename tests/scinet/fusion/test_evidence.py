"""Each term against a plain loop in float64 that rebuilds everything without the cell."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from scinet.fusion import evidence
from scinet.fusion.bank import Neighbours, blank, choose_regions
from scinet.fusion.evidence import (
    CoCounts,
    LabelStatistics,
    Reference,
    instance_evidence,
    label_evidence,
    nearest,
    region_evidence,
)

C, D, R = 4, 6, 4
SHRINKAGE, NOISE = 5.0, 0.3


def _rows(size: int, seed: int, start: int = 0, known: float = 0.6) -> Neighbours:
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, D, generator=generator), dim=-1)

    shared = torch.rand(size, 1, generator=generator)
    labels = torch.where(0.6 * torch.rand(size, C, generator=generator) + 0.4 * shared < 0.45, 1, -1)
    is_known = torch.rand(size, C, generator=generator) < known
    regions = unit(size, R).half()
    return Neighbours(
        unit(size),
        (labels * is_known).to(torch.int8),
        0.05 + 0.9 * torch.rand(size, C, generator=generator),
        torch.arange(start, start + size),
        regions,
        choose_regions(regions.float(), unit(C)),
    )


def _reference(rows: Neighbours) -> Reference:
    return Reference(rows, rows, LabelStatistics(CoCounts.of(rows.observed), SHRINKAGE, NOISE))


def _without(rows: Neighbours, index: int, label: int) -> Neighbours:
    observed = rows.observed.clone()
    observed[rows.indices == index, label] = 0
    return rows._replace(observed=observed)


def _rate(observed: list[int]) -> float:
    known = [value for value in observed if value]
    return (sum(value > 0 for value in known) + 0.5) / (len(known) + 1)


def _logit(value: float) -> float:
    return math.log(value / (1 - value))


def _vote(rows: Neighbours, label: int, distances: list[float], rate: float, rank: int, strength: float) -> float:
    """The shift by keys at distances; an infinite one is no neighbour."""
    near = sorted(distance for distance in distances if distance < math.inf)
    sigma = near[min(rank, len(near)) - 1]
    positive = known = 0.0
    for distance, seen in zip(distances, rows.observed[:, label].tolist(), strict=True):
        weight = math.exp(-(distance**2) / (2 * sigma**2))
        known += weight * (seen != 0)
        positive += weight * (seen > 0)
    return _logit((positive + strength * rate) / (known + strength)) - _logit(rate)


def _instance_loop(rows: Neighbours, query: Neighbours, row: int, label: int) -> float:
    rows = _without(rows, int(query.indices[row]), label)
    mine = query.embeddings[row].double()
    distances = [
        math.inf if index == int(query.indices[row]) else float((mine - theirs.double()).norm())
        for theirs, index in zip(rows.embeddings, rows.indices.tolist(), strict=True)
    ]
    rate = _rate(rows.observed[:, label].tolist())
    return _vote(rows, label, distances, rate, evidence.INSTANCE_NEIGHBOURS, evidence.INSTANCE_PRIOR)


def _region_loop(rows: Neighbours, query: Neighbours, row: int, label: int) -> float:
    index = int(query.indices[row])
    rows = _without(rows, index, label)
    mine = query.regions[row, int(query.choice[row, label])].double()
    distances = []
    for place, own in enumerate(rows.indices.tolist()):
        is_neighbour = own != index and int(rows.observed[place, label]) != 0
        key = rows.regions[place, int(rows.choice[place, label])].double()
        distances.append(float((mine - key).norm()) if is_neighbour else math.inf)
    rate = _rate(rows.observed[:, label].tolist())
    return _vote(rows, label, distances, rate, evidence.REGION_NEIGHBOURS, evidence.REGION_PRIOR)


def _label_loop(rows: Neighbours, query: Neighbours, row: int, label: int) -> float:
    rows = _without(rows, int(query.indices[row]), label)
    observed = rows.observed.numpy()
    correlation = np.eye(C)
    for a in range(C):
        for b in range(C):
            both = (observed[:, a] != 0) & (observed[:, b] != 0)
            x, y = (observed[both, a] > 0).astype(float), (observed[both, b] > 0).astype(float)
            if a != b and len(x) and x.std() and y.std():
                correlation[a, b] = np.corrcoef(x, y)[0, 1] * len(x) / (len(x) + SHRINKAGE)
    assert np.linalg.eigvalsh(correlation)[0] > 0.02, "the loop has no factor"
    rates = np.array([_rate(column.tolist()) for column in observed.T])
    spread = np.sqrt(rates * (1 - rates))
    others = [b for b in range(C) if b != label]
    seen, variance = [], []
    for b in others:
        own, likely = int(query.observed[row, b]), float(query.confidence[row, b])
        if own:
            seen.append(((own > 0) - rates[b]) / spread[b])
            variance.append(NOISE)
        else:
            share = likely * (1 - likely) / spread[b] ** 2
            share = min(max(share, 1e-3), 0.999)
            seen.append((likely - rates[b]) / spread[b] / (1 - share))
            variance.append(share / (1 - share))
    system = correlation[np.ix_(others, others)] + np.diag(variance)
    expected = correlation[label, others] @ np.linalg.solve(system, np.array(seen))
    value = min(max(rates[label] + spread[label] * expected, 2e-3), 1 - 2e-3)
    return _logit(value) - _logit(rates[label])


@pytest.mark.parametrize("is_stored", [True, False], ids=["of the bank", "new"])
@pytest.mark.parametrize(
    ("term", "loop"),
    [
        (lambda rows, query: instance_evidence(rows, query), _instance_loop),
        (lambda rows, query: region_evidence(rows, query), _region_loop),
        (lambda rows, query: label_evidence(_reference(rows), query), _label_loop),
    ],
    ids=["instance", "region", "label"],
)
def test_term_equals_the_loop_that_rebuilds_everything_without_the_cell(term, loop, *, is_stored: bool) -> None:  # type: ignore[no-untyped-def]
    rows = _rows(60, seed=1)
    query = rows.at(slice(5)) if is_stored else _rows(5, seed=2, start=100)
    found = term(rows, query)
    expected = [[loop(rows, query, row, label) for label in range(C)] for row in range(5)]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-3, atol=2e-3)
    assert found.abs().max() > 0.1


@pytest.mark.parametrize("term", ["instance", "region", "label"])
def test_own_label_moves_nothing_of_its_own_cell(term: str) -> None:
    rows = _rows(40, seed=3)
    cell = (7, int(rows.observed[7].nonzero()[0]))
    observed = rows.observed.clone()
    observed[cell] *= -1
    flipped = rows._replace(observed=observed)

    def shift(bank: Neighbours) -> float:
        query = bank.at(slice(7, 8))
        terms = {
            "instance": lambda: instance_evidence(bank, query),
            "region": lambda: region_evidence(bank, query),
            "label": lambda: label_evidence(_reference(bank), query),
        }
        return float(terms[term]()[0, cell[1]])

    assert shift(rows) == pytest.approx(shift(flipped), abs=1e-4)


def test_nothing_is_said_when_nothing_is_known() -> None:
    empty, query = blank(0, C, D, regions=R), _rows(3, seed=4)
    unknown = _rows(30, seed=5, start=50)._replace(observed=torch.zeros(30, C, dtype=torch.int8))
    for rows in (empty, unknown):
        torch.testing.assert_close(instance_evidence(rows, query), torch.zeros(3, C))
        torch.testing.assert_close(region_evidence(rows, query), torch.zeros(3, C))
        torch.testing.assert_close(label_evidence(_reference(rows), query), torch.zeros(3, C))


def test_correlation_is_positive_definite_when_few_pairs_are_known() -> None:
    generator = torch.Generator().manual_seed(0)
    observed = torch.randint(-1, 2, (12, 30), generator=generator).to(torch.int8)
    correlation, factor = LabelStatistics(CoCounts.of(observed), 0.0, NOISE).correlation
    assert 0 < factor < 1
    assert torch.linalg.eigvalsh(correlation.double())[0] == pytest.approx(0.02, abs=1e-5)
    assert torch.equal(correlation.diagonal(), torch.ones(30))


@pytest.mark.parametrize("k", [1, 5, 30])
def test_nearest_rows_have_their_share_of_the_vote(k: int) -> None:
    rows = _rows(40, seed=6)
    query = rows.at(slice(3))
    places, shares = nearest(rows, query, k)
    for row in range(3):
        distances = (query.embeddings[row].double() - rows.embeddings.double()).norm(dim=1)
        distances[row] = math.inf
        order = distances.argsort()
        sigma = distances[order[evidence.INSTANCE_NEIGHBOURS - 1]]
        weights = torch.exp(-(distances**2) / (2 * sigma**2))
        assert places[row].tolist() == order[:k].tolist()
        torch.testing.assert_close(shares[row].double(), (weights / weights.sum())[order[:k]], rtol=1e-3, atol=1e-5)
