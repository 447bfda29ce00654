"""Terms and weights of the fusion judged on a hold-out, and the completion judged on hidden cells."""

from __future__ import annotations

import pytest
import torch

from scinet.evaluation import fused
from scinet.evaluation.evaluator import Computed
from scinet.evaluation.metrics import evaluate
from scinet.fusion import weights

N, C = 300, 4


def _computed(*, uses: tuple[int, ...] = (1, 2), known: float = 0.5) -> Computed:
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(N, C, 5, generator=generator, dtype=torch.float64)
    cells[..., 4] = 1
    for term in {1, 2, 3} - set(uses):
        cells[..., term] = 0
    chance = torch.sigmoid(cells @ torch.tensor([1.0, 2.0, 0.5, 1.0, -1.0], dtype=torch.float64))
    truth = torch.where(torch.rand(N, C, generator=generator, dtype=torch.float64) < chance, 1, -1).to(torch.int8)
    is_known = torch.rand(N, C, generator=generator) < known
    observed = (truth * is_known).to(torch.int8)
    return Computed((torch.sigmoid(cells[..., 0]), cells), truth, observed, torch.arange(N), ())


def test_each_combination_has_weights_of_its_own_on_the_cells_that_the_mask_shows() -> None:
    computed = _computed()
    found, figures = fused.judge(computed)
    assert found is not None
    cells, known = computed.columns[1], computed.observed != 0
    labels = computed.observed[known] > 0
    alone = weights.fit(cells[known] * torch.tensor([1, 0, 0, 0, 1]), labels)
    both = weights.fit(cells[known], labels)
    assert alone is not None
    assert both is not None
    assert torch.equal(found, both)
    assert figures["fusion/log_loss_teacher"] == pytest.approx(weights.log_loss(cells[known] @ alone, labels))
    assert figures["fusion/log_loss_fused"] == pytest.approx(weights.log_loss(cells[known] @ both, labels))
    scores = torch.sigmoid(cells @ both)
    assert figures["fusion/map_fused"] == evaluate(scores, computed.observed).mean_average_precision
    assert figures["fusion/log_loss_fused"] < figures["fusion/log_loss_instance"] < figures["fusion/log_loss_teacher"]
    assert figures["fusion/weight_instance"] == pytest.approx(2.0, abs=0.5)


def test_term_that_is_not_used_is_not_told() -> None:
    _, figures = fused.judge(_computed(uses=(2,)))
    told = {key.rpartition("_")[2] for key in figures}
    assert told == {"teacher", "label", "fused", "bias"}


def test_nothing_is_told_when_nothing_can_be_fitted() -> None:
    computed = _computed()
    positives = computed.observed.clamp_min(0)
    assert fused.judge(Computed(computed.columns, computed.truth, positives, computed.index, ())) == (None, {})


def test_completion_is_judged_on_cells_that_are_hidden_and_known() -> None:
    truth = torch.tensor([[1, -1, 0], [-1, 1, 1], [1, -1, -1], [-1, -1, 1]], dtype=torch.int8)
    observed = torch.zeros_like(truth)
    observed[0] = truth[0]
    sure = torch.where(truth > 0, 0.9, 0.1)
    half = torch.full_like(sure, 0.55)
    found = fused.judge_completion(Computed((sure, half), truth, observed, torch.arange(4), ()))
    assert dict(found["Q"])["mAP"] == 100
    assert dict(found["Q"])["log-loss"] == pytest.approx(0.10536, abs=1e-4)
    assert dict(found["Q"])["calibration error"] == pytest.approx(0.1, abs=1e-6)
    # four of nine hidden cells are positive
    assert dict(found["P"])["calibration error"] == pytest.approx(0.55 - 4 / 9, abs=1e-6)


def test_completion_without_a_hidden_positive_is_not_judged() -> None:
    computed = _computed(known=1.0)
    assert fused.judge_completion(computed) == {}
