"""Every method, as the catalogue wires it, against its source's numbers: loss and gradient at each step of a run.

Two ranks share each global batch; the plain loop of ``oracles`` knows of none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from scinet import config
from scinet.data.batch import Batch
from scinet.options import Method
from scinet.zoo import catalogue
from scinet.zoo.recipe import Everyone, Recipe
from tests.scinet.zoo import oracles
from tests.scinet.zoo.oracles import Alone, Plain, Step, slopes, total

N, G, C, EPOCHS = 60, 24, 26, 8
POSITIVES = 6.5
_RELATION = torch.softmax(3 * torch.arange(C * C, dtype=torch.float64).view(C, C).sin(), dim=1)

ORACLES: dict[Method, Callable[[Recipe], Plain]] = {
    Method.bce: lambda _: Alone(oracles.bce),
    Method.an: lambda _: Alone(oracles.an),
    Method.an_ls: lambda _: Alone(oracles.an_ls),
    Method.wan: lambda _: Alone(oracles.wan_of_26_classes),
    Method.epr: lambda _: oracles.Epr(POSITIVES),
    Method.role: lambda recipe: oracles.Role(POSITIVES, recipe.state_dict()["estimates"].tolist()),
    Method.em: lambda _: Alone(oracles.em),
    Method.em_apl: lambda _: oracles.Apl(EPOCHS),
    Method.ll_r: lambda _: oracles.LargeLoss(corrects=False),
    Method.ll_ct: lambda _: oracles.LargeLoss(corrects=True),
    Method.ll_cp: lambda _: oracles.LargeLoss(corrects=True, is_permanent=True),
    Method.asl: lambda _: Alone(oracles.asl),
    Method.p_asl: lambda _: oracles.Selective(EPOCHS),
    Method.hill: lambda _: Alone(oracles.hill),
    Method.splc: lambda _: Alone(oracles.splc),
    Method.gr: lambda _: Alone(oracles.gr_of_8_epochs),
    Method.vlpl: lambda _: oracles.Vlpl(),
    Method.scpnet: lambda _: oracles.Scpnet(_RELATION.tolist()),
    Method.dualcoop: lambda _: Alone(oracles.dualcoop),
    Method.full_labels: lambda _: Alone(oracles.bce, sees_truth=True),
}
# every option of a method, at another value than its default
SETTINGS = {
    "zoo.label_smoothing=0.2": "an_ls",
    "zoo.entropy.weight=0.2": "em em_apl vlpl",
    "zoo.entropy.negatives=0.5": "em_apl",
    "zoo.entropy.negative_weight=0.5": "em_apl",
    "zoo.entropy.start=0.25": "em_apl",
    "zoo.entropy.positive_weight=0.5": "vlpl",
    "zoo.entropy.temperature=0.02": "vlpl",
    "zoo.entropy.threshold=0.5": "vlpl",
    "zoo.expectation.positives=2.5": "epr role",
    "zoo.expectation.learning_rate=0.1": "role",
    "zoo.large_loss.percent=1": "ll_r ll_ct ll_cp",
    "zoo.asymmetric.gamma_positive=1": "asl",
    "zoo.asymmetric.gamma_negative=2": "asl",
    "zoo.asymmetric.margin=0.2": "asl",
    "zoo.selective.focus_positive=1": "p_asl",
    "zoo.selective.focus_negative=3": "p_asl",
    "zoo.selective.focus_unknown=2": "p_asl",
    "zoo.selective.ignored=1": "p_asl",
    "zoo.selective.common=0.2": "p_asl",
    "zoo.robust.ceiling=2": "hill",
    "zoo.robust.margin=0.5": "hill splc scpnet",
    "zoo.robust.gamma=1": "hill splc scpnet",
    "zoo.robust.threshold=0.8": "splc scpnet",
    "zoo.robust.start=3": "splc scpnet",
    "zoo.generalised.slope_start=1": "gr",
    "zoo.generalised.slope_end=2": "gr",
    "zoo.generalised.offset_start=-1": "gr",
    "zoo.generalised.offset_end=-2": "gr",
    "zoo.generalised.centre_start=0.4": "gr",
    "zoo.generalised.centre_end=0.6": "gr",
    "zoo.generalised.width_start=1": "gr",
    "zoo.generalised.width_end=1": "gr",
    "zoo.generalised.positive_power=0.5": "gr",
    "zoo.generalised.negative_power=0.5": "gr",
    "loss.warmup_fraction=0.5": "p_asl",
    "loss.unlabelled_weight=0.5": "scpnet",
    "loss.distillation_weight=3": "scpnet",
    "loss.hard_k=2": "scpnet",
    "loss.threshold_window=30": "scpnet",
}


def _build(method: Method, *overrides: str) -> Recipe:
    head = ["model.head=dualcoop"] if method is Method.dualcoop else []
    frame = catalogue.Frame(
        num_samples=N,
        num_classes=C,
        num_positives=POSITIVES,
        num_epochs=EPOCHS,
        device=torch.device("cpu"),
        relation=lambda: _RELATION,
        cosines=lambda inputs: inputs,
    )
    return catalogue.build(config.load(None, [f"method={method.value}", *head, *overrides]), frame)


def _samples(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return truth and what a mask leaves of it, and cosines of which one is just above VLPL's threshold, one below."""
    draw = torch.rand(N, C, generator=generator)
    often = torch.full((C,), 0.25)
    often[0], often[21:] = 0.6, 0.0
    truth = torch.where(draw < 0.05, 0, torch.where(draw < 0.05 + often, 1, -1))
    observed = torch.where(torch.rand(N, C, generator=generator) < 0.4, truth, 0)
    shares = torch.full((N, C), 0.4 / (C - 2), dtype=torch.float64)
    shares[torch.arange(N), torch.arange(N) % C] = 0.305
    shares[torch.arange(N), (torch.arange(N) + 1) % C] = 0.295
    return truth, observed, 0.25 + 0.01 * shares.log()


def _logits(generator: torch.Generator, epoch: int) -> Tensor:
    """Return logits [G, C] on both sides of every margin and threshold, float32 ones as doubles."""
    centre = torch.full((G, C), -1.0)
    centre[:, 0] = 1.5  # a common class
    centre[:, 2] = -1.0 if epoch < 2 else 1.5  # common too late for P-ASL's priors
    centre[:, 21:] = -4.0
    width = torch.full((G, C), 2.0)
    centre[5], width[5] = -9.0, 0.5  # an image without a confident class
    centre[6, :21], width[6, :21] = -9.0, 0.5
    centre[6, 21:], width[6, 21:] = -3.9, 0.3  # around the lowest threshold of SCPNet, (0.95 / 26) / (2 - 1 / 26)
    if epoch < 2:
        centre[:, 1], width[:, 1] = 0.0, 0.0  # a mean prediction of one half
    return (centre + width * torch.randn(G, C, generator=generator)).double()


@functools.cache
def _run(num_views: int) -> list[list[Step]]:
    """Return the steps of each epoch: two global batches, which leave out some samples."""
    generator = torch.Generator().manual_seed(0)
    truth, observed, cosines = _samples(generator)
    return [
        [
            Step(
                epoch=epoch,
                logits=torch.cat([_logits(generator, epoch) for _ in range(num_views)]).tolist(),
                observed=observed[index].tolist(),
                truth=truth[index].tolist(),
                index=index.tolist(),
                inputs=cosines[index].tolist(),
            )
            for index in torch.randperm(N, generator=generator)[: 2 * G].split(G)
        ]
        for epoch in range(EPOCHS)
    ]


def _everyone(step: Step, dtype: torch.dtype = torch.float64) -> Everyone:
    size = len(step.index)
    observed = torch.tensor(step.observed, dtype=torch.int8)
    return Everyone(torch.tensor(step.logits[:size], dtype=dtype), observed, torch.tensor(step.index))


def _loss(recipe: Recipe, step: Step, logits: Tensor) -> Tensor:
    """Return the sum of the losses of two ranks, which have every second sample of the global batch."""
    everyone, losses = _everyone(step), list[Tensor]()
    for rank in range(2):
        mine = torch.arange(rank, len(step.index), 2)
        batch = Batch(
            inputs=torch.tensor(step.inputs, dtype=torch.float64)[mine],
            observed=everyone.observed[mine],
            truth=torch.tensor(step.truth, dtype=torch.int8)[mine],
            index=everyone.index[mine],
            ids=("",) * len(mine),
            valid=torch.ones(len(mine), dtype=torch.bool),
        )
        own = torch.cat([view[mine] for view in logits.split(len(step.index))])
        losses += recipe.loss(own, batch, step.epoch, everyone).values()
    return torch.stack(losses).sum()


def _hold(recipe: Recipe, oracle: Plain, step: Step) -> None:
    """Compare a step's loss and gradient with those of the plain loop."""
    oracle.begin(step)
    logits = torch.tensor(step.logits, dtype=torch.float64, requires_grad=True)
    loss = _loss(recipe, step, logits)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(total(step.logits, oracle), rel=1e-7)
    plain = torch.tensor(slopes(step.logits, oracle.cell, oracle.pull), dtype=torch.float64)
    torch.testing.assert_close(gradient, plain, rtol=0, atol=1e-6)


def _train(method: Method, recipe: Recipe) -> Iterator[Step]:
    """Yield each step of the run, to be looked at before the recipe remembers it."""
    kept = torch.float32 if method is Method.em_apl else torch.float64  # the type of its table of predictions
    for epoch, steps in enumerate(_run(len(method.views))):
        for step in steps:
            yield step
            if recipe.needs_everyone:
                recipe.update(_everyone(step, kept), epoch)
        recipe.end_epoch(epoch)


def _hold_run(method: Method, recipe: Recipe, oracle: Plain) -> None:
    epoch = 0
    for step in _train(method, recipe):
        if step.epoch > epoch:
            oracle.end_epoch(epoch)
            epoch = step.epoch
        _hold(recipe, oracle, step)
        oracle.end()


@pytest.mark.parametrize("method", catalogue.METHODS, ids=lambda method: method.value)
def test_loss_and_gradient_are_the_sources_when_nothing_is_set(method: Method) -> None:
    recipe = _build(method)
    _hold_run(method, recipe, ORACLES[method](recipe))


def test_unknown_cells_pay_nothing_when_asl_is_told_to_leave_them_out() -> None:
    recipe = _build(Method.asl, "zoo.asymmetric.unknown_is_negative=false")
    _hold_run(Method.asl, recipe, Alone(oracles.asl_of_known))


@pytest.mark.parametrize(
    ("method", "setting"), [(method, setting) for setting, methods in SETTINGS.items() for method in methods.split()]
)
def test_loss_is_another_when_an_option_is_set(method: str, setting: str) -> None:
    usual, other = _build(Method(method)), _build(Method(method), setting)
    runs = zip(_train(Method(method), usual), _train(Method(method), other), strict=True)
    inputs = ((step, torch.tensor(step.logits, dtype=torch.float64)) for step, _ in runs)
    assert any(
        _loss(usual, step, logits).item() != pytest.approx(_loss(other, step, logits).item(), rel=1e-6)
        for step, logits in inputs
    )


def test_estimates_start_between_04_and_06_when_nothing_is_known() -> None:
    start = torch.sigmoid(_build(Method.role).state_dict()["estimates"])
    assert 0.4 <= start.min() < 0.401
    assert 0.599 < start.max() <= 0.6
    logits = torch.logit(start)
    assert logits.mean().abs() < 0.02
    # uniform in the logit, of which a quarter lies in each quarter
    assert (logits.abs() < math.log(1.5) / 2).float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_scpnet_counts_the_last_2048_samples_when_it_has_seen_more() -> None:
    recipe, oracle = _build(Method.scpnet), oracles.Scpnet(_RELATION.tolist())
    step, many = _run(2)[0][0], 1500
    for present in (3, 4):
        observed = [[int(place == present) for place in range(C)]] * many
        counted = replace(step, logits=[[-9.0] * C] * many, observed=observed, index=list(range(many)))
        oracle.begin(counted)
        recipe.update(_everyone(counted), 0)
        oracle.end()
    # the threshold of class 3 is the probability of -3.4 with 548 positives in the window, of -3.9 with none
    weak = [[-4.5 + 0.1 * row if place == 3 else -9.0 for place in range(C)] for row in range(G)]
    _hold(recipe, oracle, replace(step, logits=weak + step.logits[G:]))
