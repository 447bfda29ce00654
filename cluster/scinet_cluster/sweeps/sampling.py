"""Which parameters a search tries next, by Optuna, from all trials so far."""

from __future__ import annotations

import contextlib
import itertools
import random
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from scinet_cluster.sweeps.ledger import State, Trial
from scinet_cluster.sweeps.options import Sampler
from scinet_cluster.sweeps.space import Dimension

_STARTUP_TRIALS = 6  # drawn at random before the estimator says anything
_FEWEST_FOR_IMPORTANCE = 5
_STATES = {State.completed: TrialState.COMPLETE, State.stopped: TrialState.PRUNED, State.failed: TrialState.FAIL}


class Sampling:
    """An Optuna study that is made anew for each question: it holds what the ledger holds, and nothing else."""

    def __init__(self, space: dict[str, Dimension], sampler: Sampler, seed: int) -> None:
        """Take what is searched, and how."""
        self._distributions = {key: dimension.distribution for key, dimension in space.items()}
        self._seed = seed
        self._sampler = _SAMPLERS.get(sampler)
        self._combinations = [] if self._sampler else _combinations(self._distributions, seed)
        optuna.logging.set_verbosity(optuna.logging.WARNING)

    def propose(self, number: int, trials: Iterable[Trial]) -> dict[str, Any] | None:
        """Return the parameters of a new trial, None if there are no further combinations.

        Args:
            number: of the new trial, from 1, which decides what is drawn at random.
            trials: so far, those under way among them.
        """
        if self._sampler is None:
            return self._combinations[number - 1] if number <= len(self._combinations) else None
        study = optuna.create_study(direction="maximize", sampler=self._sampler(self._seed * 1_000_003 + number))
        study.add_trials(_known(trials, self._distributions))
        return dict(study.ask(self._distributions).params)

    def importance(self, trials: Iterable[Trial]) -> dict[str, float]:
        """Return the share of each parameter in what sets the best trials apart from all, by PED-ANOVA.

        A trial that was stopped counts with its best so far: others of its epoch did better, so it is none of the best.
        With fewer than five trials there is nothing to say, and nothing is returned.
        """
        judged = [replace(trial, state=State.completed) for trial in trials if trial.has_ended and trial.history]
        if len(judged) < _FEWEST_FOR_IMPORTANCE:
            return {}
        study = optuna.create_study(direction="maximize")
        study.add_trials(_known(judged, self._distributions))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that some parameter never varied: its share is 0
            return optuna.importance.get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())


def _parzen(seed: int) -> BaseSampler:
    # constant_liar: trials that run at once should not all be drawn to the same place
    return TPESampler(seed=seed, n_startup_trials=_STARTUP_TRIALS, multivariate=True, constant_liar=True)


_SAMPLERS: dict[Sampler, Callable[[int], BaseSampler]] = {Sampler.tpe: _parzen, Sampler.random: RandomSampler}


def _combinations(distributions: dict[str, BaseDistribution], seed: int) -> list[dict[str, Any]]:
    choices = [found.choices for found in distributions.values() if isinstance(found, CategoricalDistribution)]
    found = [dict(zip(distributions, values, strict=True)) for values in itertools.product(*choices)]
    random.Random(seed).shuffle(found)
    return found


def _known(trials: Iterable[Trial], distributions: dict[str, BaseDistribution]) -> list[FrozenTrial]:
    """Return trials as Optuna keeps them, without a default that lies outside of the ranges."""
    found = []
    for trial in trials:
        state = _STATES.get(trial.state, TrialState.RUNNING)
        with contextlib.suppress(ValueError):
            known = create_trial(
                state=state,
                value=trial.best if state is TrialState.COMPLETE else None,
                params=trial.parameters,
                distributions=distributions,
                intermediate_values=dict(trial.history),
            )
            found.append(known)
    return found
