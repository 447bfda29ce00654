"""The stopping rules of Ray Tune as a sweep uses them."""

from __future__ import annotations

from typing import Any

import pytest
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler

from scinet_cluster.sweeps.ledger import Purpose, State, Trial
from scinet_cluster.sweeps.options import Stopping, StoppingOptions
from scinet_cluster.sweeps.tuning import SparingScheduler, stopping_rule

EPOCHS = 9


def _scheduler(rule: Stopping) -> SparingScheduler:
    return SparingScheduler(stopping_rule(StoppingOptions(rule, grace_epochs=1, reduction_factor=3.0), EPOCHS), EPOCHS)


def _epochs_until_stopped(scheduler: SparingScheduler, number: int, value: float, purpose: str = "search") -> int:
    trial: Any = TuneTrial("trial", config={"number": number, "purpose": purpose}, stub=True)
    controller: Any = None
    scheduler.on_trial_add(controller, trial)
    for epochs in range(1, EPOCHS + 1):
        result = {"epochs": epochs, "best_map": value + epochs}
        if scheduler.on_trial_result(controller, trial, result) == TrialScheduler.STOP:
            return epochs
    return EPOCHS


@pytest.mark.parametrize("rule", [Stopping.asha, Stopping.median])
def test_trial_that_is_worse_than_others_of_its_epoch_is_stopped_early(rule: Stopping) -> None:
    scheduler = _scheduler(rule)
    for number in range(1, 5):
        _epochs_until_stopped(scheduler, number, 50.0 + number)
    assert _epochs_until_stopped(scheduler, 5, 10.0) < EPOCHS
    assert scheduler.is_stopped(5)
    assert _epochs_until_stopped(scheduler, 6, 90.0) == EPOCHS
    assert not scheduler.is_stopped(6)


@pytest.mark.parametrize("rule", list(Stopping))
def test_default_and_confirmations_are_never_stopped(rule: Stopping) -> None:
    scheduler = _scheduler(rule)
    for number in range(1, 5):
        _epochs_until_stopped(scheduler, number, 50.0 + number)
    assert _epochs_until_stopped(scheduler, 0, 1.0) == EPOCHS
    assert _epochs_until_stopped(scheduler, 9, 1.0, "confirm") == EPOCHS


@pytest.mark.parametrize("rule", [Stopping.asha, Stopping.median])
def test_rule_remembers_trials_of_before_a_restart(rule: Stopping) -> None:
    scheduler = _scheduler(rule)
    history = [(epochs, 50.0 + epochs) for epochs in range(1, EPOCHS + 1)]
    known = [Trial(number, Purpose.search, number, 0, {}, State.completed, history) for number in range(1, 5)]
    scheduler.replay(known)
    assert _epochs_until_stopped(scheduler, 5, 10.0) < EPOCHS


@pytest.mark.parametrize("rule", [Stopping.asha, Stopping.median])
def test_trial_is_not_stopped_at_its_end(rule: Stopping) -> None:
    made = stopping_rule(StoppingOptions(rule, grace_epochs=EPOCHS), EPOCHS)
    scheduler = SparingScheduler(made, EPOCHS)
    for number, value in enumerate((50.0, 51.0, 52.0, 53.0, 1.0)):
        _epochs_until_stopped(scheduler, number, value)
        assert not scheduler.is_stopped(number)
