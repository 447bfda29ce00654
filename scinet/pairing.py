"""Contestants that take turns, so that a busy machine troubles all alike; their ratios, and whether these are met."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_DOUBT = 0.05


@dataclass(frozen=True)
class Verdict:
    """One line of a report: what was compared, its samples, and the most that it may be, if anything.

    The samples of a ratio are one a turn; those of a share of time (``is_share``) are one a step.
    """

    compared: str
    samples: tuple[float, ...]
    target: float | None = None
    is_share: bool = False

    @property
    def figure(self) -> float:
        """The median ratio, or the mean share: waits come in bursts, which a median would hide."""
        return statistics.mean(self.samples) if self.is_share else statistics.median(self.samples)

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true median lies with 95 % certainty (fewer than 6 samples: their range); the range of a share."""
        return (min(self.samples), max(self.samples)) if self.is_share else _around_median(self.samples)

    @property
    def is_met(self) -> str:
        """Whether the figure meets the target, and whether the interval lies on the same side."""
        if self.target is None:
            return "-"
        low, high = self.interval
        if self.figure <= self.target:
            return "yes" if high <= self.target else "yes, but the interval reaches above"
        return "no" if low > self.target else "no, but the interval reaches below"


def _around_median(samples: Sequence[float]) -> tuple[float, float]:
    """Return the narrowest pair of order statistics, equally far from both ends, that holds the median in 95 %."""
    ordered, count = sorted(samples), len(samples)
    outside, left_out = 0.0, 0
    for place in range(count // 2):
        outside += 2 * math.comb(count, place) / 2**count
        if outside > _DOUBT:
            break
        left_out = place
    return ordered[left_out], ordered[count - 1 - left_out]


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def take_turns(
    steps: Sequence[Callable[[], object]], repeats: int, settle: Callable[[], None], say: Callable[[str], None]
) -> list[list[float]]:
    """Time each step once a turn, every second turn in reverse order.

    Args:
        steps: of the contestants.
        repeats: turns, after one that warms caches and allocator and makes the optimisers' states.
        settle: waits for the device.
        say: told which turn it is.

    Returns:
        seconds of each contestant in each turn.
    """
    taken: list[list[float]] = [[] for _ in steps]
    for turn in range(repeats + 1):
        say(f"turn {turn} of {repeats}" if turn else "warming up")
        order = range(len(steps)) if turn % 2 else reversed(range(len(steps)))
        for number in order:
            started = time.perf_counter()
            steps[number]()
            settle()
            if turn:
                taken[number].append(time.perf_counter() - started)
    return taken


def table(verdicts: Sequence[Verdict]) -> str:
    """Return the verdicts as a Markdown table."""
    lines = ["| compared | figure | interval | target | met |\n| --- | --- | --- | --- | --- |\n"]
    for verdict in verdicts:
        form = ".2%" if verdict.is_share else ".3f"
        low, high = verdict.interval
        around = f"{low:{form}} to {high:{form}}" if len(verdict.samples) > 1 else "-"
        target = "-" if verdict.target is None else f"at most {verdict.target:{form}}"
        lines.append(f"| {verdict.compared} | {verdict.figure:{form}} | {around} | {target} | {verdict.is_met} |\n")
    return "".join(lines)
