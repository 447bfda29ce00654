"""What holds for every method of the zoo: cut batches, rows without a sample, memory that goes on, its size."""

from __future__ import annotations

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


def _build(method: str, *overrides: str) -> Recipe:
    head = ["model.head=dualcoop"] if method == "dualcoop" else []
    options = config.load(None, [f"method={method}", *head, *overrides])
    frame = Frame(
        num_samples=N,
        num_classes=C,
        num_positives=1.5,
        num_epochs=4,
        device=CPU,
        relation=lambda: torch.full((C, C), 1 / C),
        cosines=lambda inputs: torch.zeros(len(inputs), C),
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


@pytest.mark.parametrize(("share", "has_priors"), [(0.1, True), (0.0, False)])
def test_short_run_has_an_epoch_of_priors_unless_none_is_asked_for(share: float, has_priors: bool) -> None:
    recipe = _build("p_asl", f"loss.warmup_fraction={share}")
    logits, batch = _draw(0)
    recipe.update(_everyone(logits, batch), 0)
    assert bool(recipe.state_dict()["count"]) == has_priors
