"""The sweep's order and stopping rule in the terms of Ray Tune, which places and drives the trials."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from scinet_cluster.sweeps.agenda import Agenda
from scinet_cluster.sweeps.ledger import Purpose, State, Trial
from scinet_cluster.sweeps.options import Stopping, StoppingOptions

_METRIC, _TIME = "best_map", "epochs"


class AgendaSearcher(Searcher):
    """Hands the agenda's trials to Ray Tune, and what Ray Tune hears of them to the agenda."""

    def __init__(self, agenda: Agenda, is_stopped: Callable[[int], bool]) -> None:
        """Take the agenda, and what tells whether a trial's end was decided by the stopping rule."""
        super().__init__(metric=_METRIC, mode="max")
        self._agenda, self._is_stopped = agenda, is_stopped
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial, None if another must end first, or that there are no more."""
        trial = self._agenda.next()
        if trial is None:
            return Searcher.FINISHED if self._agenda.is_done or self._agenda.refusal else None
        self._numbers[trial_id] = trial.number
        purpose = trial.purpose.value
        return {"number": trial.number, "purpose": purpose, "seed": trial.seed, "parameters": trial.parameters}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note an evaluation."""
        self._note(self._numbers[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Note an end, whoever brought it about."""
        number, result = self._numbers.pop(trial_id), result or {}
        if error:
            self._agenda.ended(number, State.failed, "its process or its node was lost too often")
        elif result.get("failed"):
            self._agenda.ended(number, State.failed, result["failed"])
        elif result.get("done") and "holdout_map" not in result:
            self._agenda.ended(number, State.completed)
        elif self._is_stopped(number):
            self._note(number, result)
            self._agenda.ended(number, State.stopped)
        else:
            self._agenda.interrupted(number)

    def _note(self, number: int, result: dict[str, Any]) -> None:
        if "holdout_map" in result:
            self._agenda.told(number, result[_TIME], result["holdout_map"], result["placed"])

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: the ledger is on the disk already."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Read nothing."""


class SparingScheduler(FIFOScheduler):
    """A stopping rule from which the default and the confirmations are exempt; failed trials teach it nothing."""

    def __init__(self, rule: TrialScheduler | None, epochs: int) -> None:
        """Take the rule, None for none, and the epochs of a training: after the last there is nothing to save."""
        super().__init__()
        self._rule, self._epochs = rule, epochs
        self._stopped: set[int] = set()
        self._is_default_overruled = False

    def is_stopped(self, number: int) -> bool:
        """Return whether the rule has ended a trial."""
        return number in self._stopped

    def replay(self, trials: Iterable[Trial]) -> None:
        """Let the rule know trials that ended before this process began."""
        for trial in trials:
            if self._rule is None or trial.purpose is not Purpose.search or not trial.history or not trial.has_ended:
                continue
            stand_in, best = TuneTrial("replayed", stub=True), float("-inf")
            rule: Any = self._rule  # which is promised a controller, and never looks at it
            rule.on_trial_add(None, stand_in)
            for epochs, value in trial.history:
                best = max(best, value)
                rule.on_trial_result(None, stand_in, {_TIME: epochs, _METRIC: best})

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Pass it on."""
        if self._rule is not None:
            self._rule.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Let the rule decide, but for the default, which is to end what others are compared with."""
        number, is_search = trial.config["number"], trial.config["purpose"] == Purpose.search.value
        if self._rule is None or not is_search or (number == 0 and self._is_default_overruled):
            return TrialScheduler.CONTINUE
        decision = self._rule.on_trial_result(tune_controller, trial, result)
        if decision != TrialScheduler.STOP or result.get(_TIME, 0) >= self._epochs:
            return TrialScheduler.CONTINUE
        if number == 0:
            self._is_default_overruled = True
            return TrialScheduler.CONTINUE
        self._stopped.add(number)
        return TrialScheduler.STOP


def stopping_rule(options: StoppingOptions, epochs: int) -> TrialScheduler | None:
    """Return Ray Tune's stopping rule as the configuration names it."""
    if options.rule is Stopping.asha:
        return AsyncHyperBandScheduler(
            time_attr=_TIME,
            metric=_METRIC,
            mode="max",
            max_t=max(epochs, options.grace_epochs + 1),
            grace_period=options.grace_epochs,
            reduction_factor=options.reduction_factor,
            stop_last_trials=False,
        )
    if options.rule is Stopping.median:
        return MedianStoppingRule(
            time_attr=_TIME,
            metric=_METRIC,
            mode="max",
            grace_period=options.grace_epochs,
            min_time_slice=math.inf,  # type: ignore[arg-type]  # it would pause trials, and what is paused keeps neither process nor place
        )
    return None
