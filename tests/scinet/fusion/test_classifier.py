"""The fused classifier, its file, and terms that say nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from scinet.fusion import weights
from scinet.fusion.bank import Neighbours, blank, plain_rows
from scinet.fusion.classifier import FusedClassifier, from_tensors
from scinet.fusion.evidence import CoCounts, LabelStatistics, Reference

C, D = 6, 16
USED = torch.tensor([1.0, 0.5, 0.25, 0.0, -0.1], dtype=torch.float64)


class _World:
    """Images whose first coordinates are their labels' log-odds, and a teacher that sees them through noise."""

    def __init__(self, seed: int, *, shared: float) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._shared = shared

    def rows(self, size: int, start: int, known: float = 0.5) -> tuple[Neighbours, Tensor]:
        """Return rows, and their whole truth."""
        own = torch.randn(size, C, generator=self._generator)
        common = torch.randn(size, 1, generator=self._generator)
        score = 1.5 * (self._shared * common + (1 - self._shared) * own) - 1
        truth = torch.rand(size, C, generator=self._generator) < torch.sigmoid(3 * score)
        noise = torch.randn(size, C, generator=self._generator)
        seen = torch.cat([score, 0.3 * torch.randn(size, D - C, generator=self._generator)], 1)
        is_known = torch.rand(size, C, generator=self._generator) < known
        observed = torch.where(truth, 1, -1) * is_known
        probabilities = torch.sigmoid(1.5 * score + noise)
        unit = torch.nn.functional.normalize(seen, dim=1)
        return plain_rows(unit, observed.to(torch.int8), probabilities, torch.arange(start, start + size)), truth


def _classifier(rows: Neighbours, uses: tuple[bool, bool, bool] = (True, True, False)) -> FusedClassifier:
    reference = Reference(rows, blank(0, C, D), LabelStatistics(CoCounts.of(rows.observed), 30.0, 0.3))
    return FusedClassifier(reference, USED, uses, tuple(map(str, rows.indices.tolist())))


def _fitted(
    world: _World, *, uses: tuple[bool, bool, bool] = (True, True, False), shuffles: bool = False
) -> tuple[dict[str, float], Tensor]:
    """Return the weights, and the terms [N, C, 5] of new images."""
    bank, _ = world.rows(800, 0)
    if shuffles:
        order = torch.randperm(len(bank.embeddings), generator=torch.Generator().manual_seed(0))
        bank = bank._replace(embeddings=bank.embeddings[order])
    query, truth = world.rows(600, 5000, known=0.0)
    cells = weights.features(query.confidence, _classifier(bank, uses).evidence(query))
    found = weights.fit(cells.flatten(0, 1), truth.flatten())
    assert found is not None
    return dict(zip(weights.TERMS, found.tolist(), strict=True)), cells


def test_instance_term_has_weight_when_neighbours_speak() -> None:
    found, _ = _fitted(_World(1, shared=0.6))
    assert found["instance"] > 0.2


def test_label_term_has_weight_when_labels_depend_on_each_other() -> None:
    found, cells = _fitted(_World(1, shared=0.6), uses=(False, True, False))
    assert found["label"] * float(cells[..., 2].std()) > 0.2


def test_label_term_has_no_weight_when_labels_are_independent() -> None:
    found, cells = _fitted(_World(2, shared=0.0), uses=(False, True, False))
    assert found["label"] * float(cells[..., 2].std()) < 0.1


def test_instance_term_has_no_weight_when_features_are_shuffled() -> None:
    found, cells = _fitted(_World(3, shared=0.6), shuffles=True)
    assert found["instance"] * float(cells[..., 1].std()) < 0.1


def test_term_of_weight_zero_is_not_computed() -> None:
    bank, _ = _World(4, shared=0.5).rows(50, 0)
    classifier = replace(_classifier(bank), weights=torch.tensor(weights.PRIOR, dtype=torch.float64))
    assert classifier.evidence(bank, only_weighty=True) == (None, None, None)
    expected = torch.logit(bank.confidence.clamp(1e-4, 1 - 1e-4))
    torch.testing.assert_close(classifier.log_odds(bank), expected, rtol=1e-5, atol=1e-5)


def test_known_labels_of_an_image_move_its_other_classes() -> None:
    world = _World(5, shared=0.8)
    classifier = _classifier(world.rows(800, 0)[0])
    query, _ = world.rows(1, 9000, known=0.0)
    observed = torch.zeros(1, C, dtype=torch.int8)
    observed[0, 0] = 1
    shift = classifier.log_odds(query._replace(observed=observed)) - classifier.log_odds(query)
    assert (shift[0, 1:] > 0.05).all()


def test_file_holds_the_classifier() -> None:
    world = _World(6, shared=0.5)
    classifier = _classifier(world.rows(90, 0)[0])
    query, _ = world.rows(7, 500)
    found = from_tensors(classifier.tensors(), num_classes=C)
    assert (found.uses, found.num_regions) == (classifier.uses, 0)
    assert torch.equal(found.weights, classifier.weights)
    assert found.names == classifier.names
    # embeddings are kept in half precision
    torch.testing.assert_close(found.log_odds(query), classifier.log_odds(query), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weights", None, "no tensor 'weights'"),
        ("weights", torch.zeros(4), r"'weights' has shape \[4\], expected \[5\]"),
        ("rows.observed", torch.zeros(90, 3, dtype=torch.int8), r"'rows.observed' has shape \[90, 3\]"),
        ("rows.indices", torch.zeros(3, dtype=torch.int64), "'rows.embeddings' has shape"),
        ("names", torch.tensor([91, 93], dtype=torch.uint8), "'names' are not those of 90 samples"),
        ("names", torch.tensor([91], dtype=torch.uint8), "Expecting value"),
        ("label", torch.tensor([30.0, 0.0]), "numbers out of range"),
        ("label", torch.tensor(30.0), "is unreadable"),
        ("rows.indices", torch.zeros(90), "'rows.indices' is torch.float32, expected torch.int64"),
        ("regions.regions", torch.zeros(3, 4, D).half(), "'regions.choice' has shape|'regions.regions' has shape"),
        ("weights", torch.full((5,), torch.nan), "numbers out of range"),
        ("rows.embeddings", torch.full((90, D), torch.inf).half(), "numbers out of range"),
    ],
)
def test_file_that_is_no_classifier_is_refused(name: str, value: Tensor | None, message: str) -> None:
    tensors = _classifier(_World(7, shared=0.5).rows(90, 0)[0]).tensors()
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    with pytest.raises(ValueError, match=message):
        from_tensors(tensors, num_classes=C)
