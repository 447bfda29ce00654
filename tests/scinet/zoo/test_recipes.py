"""What the methods of the zoo remember, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scinet import config
from scinet.data.batch import Batch
from scinet.errors import ConfigError
from scinet.options import Method
from scinet.zoo import catalogue
from scinet.zoo.catalogue import Frame, build, sees_everyone, table_bytes
from scinet.zoo.recipe import Everyone, Recipe

N, C = 12, 4
CPU = torch.device("cpu")
METHODS = [method.value for method in catalogue.METHODS]


def _build(
    method: str,
    *overrides: str,
    cosines: Callable[[Tensor], Tensor] | None = None,
    relation: Callable[[], Tensor] | None = None,
) -> Recipe:
    head = ["model.head=dualcoop"] if method == "dualcoop" else []
    options = config.load(None, [f"method={method}", *head, *overrides])
    frame = Frame(
        num_samples=N,
        num_classes=C,
        num_positives=1.5,
        num_epochs=4,
        device=CPU,
        relation=relation or (lambda: torch.full((C, C), 1 / C)),
        cosines=cosines or (lambda inputs: torch.zeros(len(inputs), C)),
    )
    return build(options, frame)


def _batch(observed: Tensor, index: Tensor | None = None, truth: Tensor | None = None) -> Batch:
    rows = len(observed)
    index = torch.arange(rows) if index is None else index
    labels = observed.to(torch.int8)
    ids = tuple(map(str, index.tolist()))
    return Batch(torch.zeros(rows, 2), labels, labels if truth is None else truth, index, ids, index >= 0)


def _draw(seed: int, rows: int = 6, views: int = 1) -> tuple[Tensor, Batch]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(views * rows, C, generator=generator)
    return logits, _batch(torch.randint(-1, 2, (rows, C), generator=generator))


def _everyone(logits: Tensor, batch: Batch) -> Everyone:
    return Everyone(logits[: len(batch.observed)], batch.observed, batch.index)


def _total(recipe: Recipe, logits: Tensor, batch: Batch, epoch: int = 3, everyone: Everyone | None = None) -> Tensor:
    parts = recipe.loss(logits, batch, epoch, everyone or _everyone(logits, batch))
    return torch.stack(list(parts.values())).sum()


def _part(batch: Batch, rows: slice) -> Batch:
    return Batch(
        batch.inputs[rows],
        batch.observed[rows],
        batch.truth[rows],
        batch.index[rows],
        batch.ids[rows],
        batch.valid[rows],
    )


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 99), cut=st.integers(0, 6))
def test_loss_is_the_sum_over_parts_when_the_batch_is_cut(method: str, seed: int, cut: int) -> None:
    recipe = _build(method, "zoo.large_loss.percent=5", "zoo.selective.ignored=1", "loss.warmup_fraction=0")
    num_views = len(Method(method).views)
    logits, batch = _draw(seed, views=num_views)
    everyone = _everyone(logits, batch)
    recipe.update(everyone, 0)
    views = logits.chunk(num_views)
    parts = [
        _total(recipe, torch.cat([view[rows] for view in views]), _part(batch, rows), 3, everyone)
        for rows in (slice(0, cut), slice(cut, 6))
    ]
    assert sum(parts).item() == pytest.approx(_total(recipe, logits, batch).item(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_rows_without_a_sample_count_for_nothing(method: str) -> None:
    recipe = _build(method)
    num_views = len(Method(method).views)
    logits, batch = _draw(1, views=num_views)
    padded = _batch(
        torch.cat([batch.observed, torch.zeros(2, C, dtype=torch.int8)]),
        torch.cat([batch.index, -torch.ones(2).long()]),
    )
    wide = torch.cat([torch.cat([view, torch.full((2, C), 9.0)]) for view in logits.chunk(num_views)])
    wide.requires_grad_()
    everyone = _everyone(logits, batch)
    total = _total(recipe, wide, padded, 3, everyone)
    assert total.item() == pytest.approx(_total(recipe, logits, batch).item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(total, wide)
    assert not gradient.view(num_views, 8, C)[:, 6:].any()


@pytest.mark.parametrize("method", METHODS)
def test_memory_goes_on_where_another_instance_stopped(method: str) -> None:
    first, second = (_build(method, "zoo.large_loss.percent=5", "loss.warmup_fraction=0.5") for _ in range(2))
    num_views = len(Method(method).views)
    for epoch in range(3):
        logits, batch = _draw(epoch, views=num_views)
        if first.needs_everyone:
            first.update(_everyone(logits, batch), epoch)
        first.end_epoch(epoch)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    logits, batch = _draw(9, views=num_views)
    assert torch.equal(_total(first, logits, batch), _total(second, logits, batch))


def test_table_of_a_method_is_refused_when_it_is_larger_than_the_budget() -> None:
    with pytest.raises(ConfigError, match=r"method=role keeps 12 bytes .* zoo.memory_budget_mb=0"):
        _build("role", "zoo.memory_budget_mb=0")
    options = config.load(None, ["method=role"])
    assert table_bytes(options, 10, 5) == 600
    assert table_bytes(config.load(None, ["method=an"]), 10, 5) == 0


@pytest.mark.parametrize("method", ["role", "em_apl", "ll_cp"])
def test_announced_table_is_the_one_that_is_kept(method: str) -> None:
    kept = sum(value.nbytes for value in _build(method).state_dict().values() if value.shape == (N, C))
    assert table_bytes(config.load(None, [f"method={method}"]), N, C) == kept


@pytest.mark.parametrize("method", METHODS)
def test_announced_look_at_the_global_batch_is_the_one_that_is_taken(method: str) -> None:
    assert _build(method).needs_everyone == sees_everyone(Method(method))


def test_correction_stays_when_it_was_permanent() -> None:
    recipe = _build("ll_cp", "zoo.large_loss.percent=10")
    observed = torch.zeros(5, C, dtype=torch.int8)
    logits = torch.arange(5.0 * C).view(5, C)  # 2 of 20 cells are rejected, the one above the threshold for good
    recipe.update(Everyone(logits, observed, torch.arange(5)), 1)
    corrected = recipe.state_dict()["corrected"]
    assert corrected.nonzero().tolist() == [[4, 3]]
    quiet = torch.full((1, C), -1.0)
    batch = _batch(observed[:1], torch.tensor([4]))
    positive = recipe.loss(quiet, batch, 0, Everyone(quiet, observed[:1], batch.index))["supervised"]
    cost = torch.nn.functional.softplus(quiet)
    assert positive.item() == pytest.approx(float(cost[0, :3].sum() + torch.nn.functional.softplus(torch.tensor(1.0))))


def test_least_likely_unknown_cells_become_soft_negatives_when_half_the_epochs_are_over() -> None:
    recipe = _build("em_apl", "zoo.entropy.negatives=1", "zoo.entropy.start=0.5")
    probabilities = torch.linspace(0.05, 0.6, N).unsqueeze(1).expand(N, C)
    observed = torch.zeros(N, C, dtype=torch.int8)
    observed[0], observed[1] = 1, -1
    everyone = Everyone(torch.logit(probabilities), observed, torch.arange(N))
    recipe.update(everyone, 0)
    recipe.end_epoch(0)
    assert recipe.state_dict()["targets"].isnan().all()
    recipe.update(everyone, 1)
    recipe.end_epoch(1)
    targets = recipe.state_dict()["targets"]
    chosen = (~targets.isnan())[:, 0].nonzero().flatten().tolist()
    assert chosen == [2, 3, 4, 5, 6]  # half of the ten unknown ones, for two passes are left
    assert targets[chosen, 0].tolist() == pytest.approx(probabilities[chosen, 0].tolist())
    recipe.update(everyone, 2)
    recipe.end_epoch(2)
    assert int((~recipe.state_dict()["targets"].isnan())[:, 0].sum()) == 10


def test_estimates_start_at_the_known_labels_and_follow_the_classifier() -> None:
    recipe = _build("role", "zoo.expectation.learning_rate=0.5")
    observed = torch.tensor([[1, -1, 0, 0]], dtype=torch.int8)
    logits = torch.tensor([[0.0, 0.0, 4.0, -4.0]])
    index = torch.tensor([3])
    start = recipe.state_dict()["estimates"][3].clone()
    for _ in range(20):
        recipe.update(Everyone(logits, observed, index), 0)
    estimates = recipe.state_dict()["estimates"]
    # half way between certainty and the classifier's one half
    assert 0.5 < estimates[3, 0] < 1.5
    assert -1.5 < estimates[3, 1] < -0.5
    assert estimates[3, 2] > start[2]
    assert estimates[3, 3] < start[3]
    assert estimates[[0, 1, 2]].abs().max() < 0.41


def test_pseudo_positive_comes_from_the_untrained_towers() -> None:
    cosines = torch.tensor([[0.30, 0.10, 0.05, 0.0]])
    recipe = _build("vlpl", cosines=lambda inputs: cosines)
    batch = _batch(torch.zeros(1, C, dtype=torch.int8))
    logits = torch.zeros(1, C, requires_grad=True)
    (gradient,) = torch.autograd.grad(_total(recipe, logits, batch), logits)
    assert gradient[0, 0].item() == pytest.approx(-0.7 * (0.9 - 0.5))
    assert gradient[0, 1:].abs().max().item() == 0.0  # entropy is flat at one half


def test_prior_is_the_mean_prediction_of_the_first_epochs() -> None:
    recipe = _build("p_asl", "loss.warmup_fraction=0.5", "zoo.selective.ignored=0")
    observed = torch.zeros(3, C, dtype=torch.int8)
    confident = torch.tensor([[3.0, -3.0, -3.0, -3.0]]).expand(3, C)
    everyone = Everyone(confident, observed, torch.arange(3))
    assert _total(recipe, confident, _batch(observed), 1, everyone).item() == 0.0
    recipe.update(everyone, 0)
    recipe.update(Everyone(-confident, observed, torch.arange(3)), 2)  # too late to count
    wrong = torch.zeros(1, C, requires_grad=True)
    (gradient,) = torch.autograd.grad(_total(recipe, wrong, _batch(observed[:1]), 2, everyone), wrong)
    assert gradient[0, 0] == 0
    assert (gradient[0, 1:] > 0).all()


@pytest.mark.parametrize(("share", "has_priors"), [(0.1, True), (0.0, False)])
def test_short_run_has_an_epoch_of_priors_unless_none_is_asked_for(share: float, has_priors: bool) -> None:
    recipe = _build("p_asl", f"loss.warmup_fraction={share}")
    logits, batch = _draw(0)
    recipe.update(_everyone(logits, batch), 0)
    assert bool(recipe.state_dict()["count"]) == has_priors


def test_known_positives_count_for_the_thresholds_of_scpnet() -> None:
    recipe = _build("scpnet", "loss.hard_k=1", "loss.threshold_window=4")
    observed = torch.tensor([[1, 0, 0, 0]], dtype=torch.int8).expand(4, C)
    recipe.update(Everyone(torch.full((4, C), -9.0), observed, torch.arange(4)), 0)
    # class 0 has as many positives as there are samples: it asks for 0.95, the others for the least, 0.95 / (2 C - 1)
    probabilities = torch.tensor(
        [[0.94, 0.1, 0.1, 0.1], [0.96, 0.1, 0.1, 0.1], [0.1, 0.13, 0.1, 0.1], [0.1, 0.14, 0.1, 0.1]]
    )
    strong = torch.zeros(4, C, requires_grad=True)
    batch = _batch(torch.zeros(4, C, dtype=torch.int8))
    weak = torch.logit(probabilities)
    parts = recipe.loss(torch.cat([weak, strong]), batch, 0, Everyone(weak, batch.observed, batch.index))
    (gradient,) = torch.autograd.grad(parts["consistency"], strong)
    labels = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    assert torch.equal(gradient[[1, 3]], 0.125 * (0.5 - labels))
    assert not gradient[[0, 2]].any()


def test_strong_view_follows_labels_and_related_probabilities_of_the_weak_one() -> None:
    relation = torch.softmax(torch.arange(16.0, dtype=torch.float64).view(C, C).sin(), dim=1)
    recipe = _build(
        "scpnet", "loss.hard_k=2", "loss.distillation_weight=3", "loss.unlabelled_weight=0.5", relation=lambda: relation
    )
    logits, batch = _draw(5, views=2)
    logits = logits.double()
    weak, strong = logits.chunk(2)
    parts = recipe.loss(logits, batch, 0, _everyone(logits, batch))
    hard, soft = 0.0, 0.0
    for row in range(6):
        probabilities = torch.sigmoid(weak[row]).tolist()
        likely = sorted(range(C), key=lambda c: -probabilities[c])[:2]
        passed = [c for c in likely if probabilities[c] >= 0.95 / (2 * C - 1)]
        for c in range(C) if passed else ():
            known = int(batch.observed[row, c])
            label = float(known > 0 or (known == 0 and c in passed))
            related = sum(float(relation[c, other]) * probabilities[other] for other in range(C))
            q = float(torch.sigmoid(strong[row, c]))
            hard -= label * math.log(q) + (1 - label) * math.log(1 - q)
            soft -= related * math.log(q) + (1 - related) * math.log(1 - q)
    assert parts["consistency"].item() == pytest.approx(0.5 * hard, rel=1e-9)
    assert parts["relation"].item() == pytest.approx(1.5 * soft, rel=1e-9)


def test_ceiling_sees_the_labels_behind_the_mask() -> None:
    truth = torch.tensor([[1, -1, 0, 1]], dtype=torch.int8)
    batch = _batch(torch.zeros(1, C, dtype=torch.int8), truth=truth)
    logits: Any = torch.zeros(1, C)
    assert _total(_build("full_labels"), logits, batch).item() == pytest.approx(3 * 0.6931472)
    assert _total(_build("bce"), logits, batch).item() == 0
