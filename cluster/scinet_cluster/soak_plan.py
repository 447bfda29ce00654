"""Which fault comes next in a soak, and when."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

from scinet.errors import TrainingError
from scinet_cluster.faults import Fault
from scinet_cluster.soak_start import LOOKS_EVERY_S, Start, step_of

_SHARE_AT_START = 0.2  # of the faults that come before the first step of a start
_SLACK_S = 60.0


class Plan:
    """Draws faults, each kind once before any comes again, and moments."""

    def __init__(self, kills: int, seed: int, *, total_steps: int, first_step_s: float, took_s: float) -> None:
        """Plan from how the undisturbed run went: its steps, the seconds to the first of them and to its end."""
        self.chance = random.Random(seed)
        self.total_steps, self.first_step_s, self.took_s = total_steps, first_step_s, took_s
        self.left = kills
        self._kinds = self._draw_kinds()
        self._step_s = (took_s - first_step_s) / max(total_steps, 1)
        self._stretch = max(2 * total_steps // (kills + 1), 1)

    def _draw_kinds(self) -> Iterator[Fault]:
        while True:
            kinds = list(Fault)
            self.chance.shuffle(kinds)
            yield from kinds

    def draw(self) -> Fault:
        """Return the next fault."""
        self.left -= 1
        return next(self._kinds)

    def await_moment(self, start: Start, run: Path) -> bool:
        """Wait until the next fault is due, and return False if the run ends before.

        Raises:
            TrainingError: if the run does not come so far.
        """
        deadline = time.monotonic() + 2 * self.took_s + _SLACK_S
        delay_s = self.chance.uniform(0, self.first_step_s)
        if self.chance.random() >= _SHARE_AT_START:
            target = step_of(run) + self.chance.randint(1, self._stretch)
            delay_s = self.chance.uniform(0, self._step_s)
            while start.is_running and step_of(run) < target:
                if time.monotonic() > deadline:
                    raise TrainingError(f"{run} did not reach step {target} in time:\n{start.text[-3000:]}")
                time.sleep(LOOKS_EVERY_S)
        end = time.monotonic() + delay_s
        while start.is_running and time.monotonic() < end:
            time.sleep(min(LOOKS_EVERY_S, delay_s))
        return start.is_running
