"""What a rank measures while it trains, handed over at once; whoever takes it must not block the training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Standing:
    """How far a run has come: counts of all ranks; ``epoch`` counts finished ones."""

    steps: int
    planned_steps: int
    epoch: int
    samples: int
    skipped_samples: int
    bad_steps: int


class Observer:
    """Keeps nothing: for training that nobody looks at, such as measurements."""

    def stand(self, standing: Standing) -> None:
        """Take where the run stands."""

    def step(self, *, seconds: float, waited_s: float, fusion_s: Iterable[float]) -> None:
        """Take the times of a step.

        Args:
            seconds: of the whole step on this rank, its wait for data included.
            waited_s: of that wait.
            fusion_s: of the fusions that have ended since the last step.
        """

    def stalled(self, seconds: float) -> None:
        """Take how long training stood still for a checkpoint."""

    def checkpoint(self, seconds: float, *, is_written: bool) -> None:
        """Take how long a checkpoint took, from the copy in memory to its name, and whether it was written."""
