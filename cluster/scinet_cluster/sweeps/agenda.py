"""Which trial of a sweep comes next, and what is noted of each: the ledger's only writer."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

from scinet_cluster.sweeps.ledger import Ledger, Purpose, State, Trial
from scinet_cluster.sweeps.options import Sweep
from scinet_cluster.sweeps.sampling import Sampling


class Agenda:
    """First what was interrupted, then the default, then the search, at last the best ones with other seeds."""

    def __init__(self, sweep: Sweep, ledger: Ledger, say: Callable[[str], None]) -> None:
        """Go on from the ledger.

        Args:
            sweep: what is searched.
            ledger: of its folder.
            say: told of each end.
        """
        self._sweep, self._ledger, self._say = sweep, ledger, say
        self._sampling = Sampling(sweep.space, sweep.options.sampler, sweep.options.seed)
        self._interrupted = [trial for _, trial in sorted(ledger.trials.items()) if not trial.has_ended]
        self._running: dict[int, float] = {}
        self._is_exhausted = False
        self.refusal = ""

    @property
    def num_left(self) -> int:
        """An upper bound of the trials that are still to be started."""
        trials, confirm = self._sweep.options.trials, self._sweep.options.confirm
        again = (min(confirm.top, trials - 1) + 1) * confirm.seeds if confirm.top else 0
        return max(trials + again - sum(trial.has_ended for trial in self._ledger.trials.values()), 0)

    @property
    def is_done(self) -> bool:
        """Whether all that was to be tried has ended."""
        return not self._running and not self._interrupted and not self._search_goes_on() and not self._unconfirmed()

    @property
    def running(self) -> list[Trial]:
        """Trials that have been started and not ended."""
        return [self._ledger.trials[number] for number in self._running]

    def next(self) -> Trial | None:
        """Return a trial to start, or None: then not before another has ended, or none any more."""
        trials = self._ledger.trials
        if self.refusal or (self._running and not any(trial.history or trial.has_ended for trial in trials.values())):
            # the first shows that the training works, and computes what all of them share
            return None
        if self._interrupted:
            trial = self._interrupted.pop(0)
        elif self._search_goes_on():
            made = self._searched()
            if made is None:
                self._is_exhausted = True
                return self.next()
            trial = made
        elif any(known.purpose is Purpose.search for known in self.running) or not self._unconfirmed():
            return None
        else:
            trial = self._confirmation(*self._unconfirmed()[0])
        self._running[trial.number] = time.monotonic()
        self._ledger.write(trial)
        return trial

    def told(self, number: int, epochs: int, holdout_map: float, placed: list[tuple[int, str, str]]) -> None:
        """Note an evaluation."""
        trial = self._ledger.trials[number]
        trial.placed = placed
        trial.note(epochs, holdout_map)

    def ended(self, number: int, state: State, reason: str = "") -> None:
        """Note how a trial ended."""
        trial = self._ledger.trials[number]
        trial.seconds += time.monotonic() - self._running.pop(number)
        trial.state, trial.reason = state, reason
        self._ledger.write(trial)
        self._say(self._in_words(trial))
        if state is State.failed and not any(known.history for known in self._ledger.trials.values()):
            self.refusal = f"the first trial, of the default, failed before its first evaluation: {reason}"

    def interrupted(self, number: int) -> None:
        """Note that a trial is to go on later."""
        trial = self._ledger.trials[number]
        trial.seconds += time.monotonic() - self._running.pop(number)
        self._ledger.write(trial)

    def _search_goes_on(self) -> bool:
        return not self._is_exhausted and len(self._ledger.of(Purpose.search)) < self._sweep.options.trials

    def _searched(self) -> Trial | None:
        number, base = len(self._ledger.trials), self._sweep.base
        parameters: dict[str, Any] | None = {key: found.default for key, found in self._sweep.space.items()}
        if number:
            parameters = self._sampling.propose(number, self._ledger.of(Purpose.search))
        return None if parameters is None else Trial(number, Purpose.search, number, base.seed, parameters)

    def _unconfirmed(self) -> list[tuple[Trial, int]]:
        """Return what is to be trained again, and with which seed, seed by seed."""
        options = self._sweep.options.confirm
        known = {(trial.confirms, trial.seed) for trial in self._ledger.of(Purpose.confirm)}
        chosen = candidates(self._ledger, options.top)
        if len(chosen) < 2:
            return []
        seeds = range(self._sweep.base.seed + 1, self._sweep.base.seed + 1 + options.seeds)
        return [(trial, seed) for seed in seeds for trial in chosen if (trial.number, seed) not in known]

    def _confirmation(self, trial: Trial, seed: int) -> Trial:
        return Trial(len(self._ledger.trials), Purpose.confirm, trial.number, seed, trial.parameters)

    def _in_words(self, trial: Trial) -> str:
        what = f"trial {trial.number}"
        if trial.purpose is Purpose.confirm:
            what += f" (trial {trial.confirms} with seed {trial.seed})"
        if trial.state is State.failed:
            return f"{what} failed: {trial.reason}"
        best = max(self._ledger.of(Purpose.search), key=lambda known: known.best or -1.0)
        verb = "ended" if trial.state is State.completed else f"stopped after epoch {trial.history[-1][0]}"
        line = f"{what} {verb}: hold-out mAP {trial.best or math.nan:.2f}, {trial.seconds:.0f} s"
        if trial.purpose is Purpose.search:
            line += f"; best so far {best.best or math.nan:.2f} (trial {best.number})"
        return line


def candidates(ledger: Ledger, top: int) -> list[Trial]:
    """Return the default and the ``top`` best others of the search that went to their end; none for ``top`` 0."""
    completed = [trial for trial in ledger.of(Purpose.search) if trial.state is State.completed and trial.history]
    others = sorted((trial for trial in completed if trial.number), key=lambda trial: -(trial.best or 0.0))
    return [*(trial for trial in completed if not trial.number), *others[:top]] if top else []


def confirmed(ledger: Ledger, trial: Trial) -> list[float]:
    """Return the hold-out mAP of a trial's parameters with the other seeds."""
    return [
        known.best
        for known in ledger.of(Purpose.confirm)
        if known.confirms == trial.number and known.state is State.completed and known.best is not None
    ]


def winner(ledger: Ledger) -> Trial | None:
    """Return the best trial: by its mean over the other seeds where there are any, else by its own hold-out mAP."""
    again = [trial for trial in ledger.of(Purpose.search) if confirmed(ledger, trial)]
    if again:
        return max(again, key=lambda trial: statistics.fmean(confirmed(ledger, trial)))
    judged = [trial for trial in ledger.of(Purpose.search) if trial.best is not None and trial.state is State.completed]
    return max(judged, key=lambda trial: trial.best or 0.0, default=None)
