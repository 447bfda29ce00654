"""The figures of a training run: sums between two logged steps, and the lines of ``metrics.jsonl``."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scinet.data.batch import Batch
from scinet.distributed import Ranks, gather_rows, sum_over_ranks
from scinet.objective import Step
from scinet.telemetry import Rows


@dataclass
class Progress:
    """Where a run stands, and which epoch did best on the hold-out; samples seen and skipped are of all ranks.

    ``epoch`` counts finished epochs, ``judged`` those at the last evaluation, which gave ``last_map``; ``bad_steps``
    were left out because of numbers that are not finite, ``bad_in_a_row`` of them just now.
    """

    epoch: int = 0
    step: int = 0
    judged: int = 0
    best_epoch: int = -1
    best_map: float = -1.0
    last_map: float = -1.0
    samples: int = 0
    skipped: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0


@dataclass
class _Window:
    """Sums between two logged steps, kept on the device so that only logging waits for it."""

    steps: int = 0
    samples: int = 0
    waited_s: float = 0.0
    started_s: float = field(default_factory=time.monotonic)
    parts: dict[str, Tensor] = field(default_factory=dict)


class Meter:
    """Sums what the steps measure, and writes it over all ranks."""

    def __init__(self, log: Rows, ranks: Ranks, *, num_classes: int, accumulation_steps: int) -> None:
        """Begin with nothing summed."""
        self._log, self._ranks, self._num_classes, self._accumulation = log, ranks, num_classes, accumulation_steps
        self._window = _Window()

    def begin(self) -> None:
        """Forget what was summed."""
        self._window = _Window()

    def wait(self, seconds: float) -> None:
        """Count seconds for which the step waited for data."""
        self._window.waited_s += seconds

    def add(self, steps: list[Step], micro: list[Batch], num_valid: int) -> None:
        """Add the micro-batches of an optimiser step; ``num_valid`` are the samples of all ranks."""
        parts = self._window.parts
        for step, batch in zip(steps, micro, strict=True):
            for name, value in _measure(step, batch).items():
                parts[name] = parts[name] + value if name in parts else value.clone()
        self._window.steps += 1
        self._window.samples += num_valid

    def write(self, progress: Progress, figures: dict[str, Any], step: Step | None, batch: Batch) -> dict[str, Any]:
        """Sum over ranks, write a line of metrics.jsonl and begin anew. Collective.

        Args:
            progress: of the run.
            figures: that are equal on all ranks.
            step: the last one, or None if it was left out.
            batch: of that step.

        Returns:
            the line.
        """
        window = self._window
        names = sorted(window.parts)
        stacked = torch.stack([window.parts[name].double().reshape(()) for name in names]) if names else torch.empty(0)
        sums = dict(zip(names, sum_over_ranks(stacked, self._ranks).tolist(), strict=True))
        micro_steps = max(1, window.steps) * self._accumulation
        seconds = time.monotonic() - window.started_s
        samples = max(1, window.samples)
        row: dict[str, Any] = {
            "step": progress.step,
            "epoch": progress.epoch,
            "samples_seen": progress.samples,
            **{name: value / micro_steps for name, value in sums.items() if name.startswith("loss/")},
            **figures,
            "samples_per_second": samples / seconds,
            "data_wait_share": window.waited_s / seconds,
        }
        if "known_cells" in sums:
            row["known_ratio"] = sums["known_cells"] / (samples * self._num_classes)
        if "pseudo/positives" in sums:
            row["pseudo_positives"] = sums["pseudo/positives"]
            row["pseudo_precision"] = _ratio(sums["pseudo/right"], sums["pseudo/checked"])
            row["pseudo_recall"] = _ratio(sums["pseudo/right"], sums["pseudo/wanted"])
        if step is not None:
            row |= self._judge_confidence(step, batch)
        self._log.write(row)
        self.begin()
        return row

    def _judge_confidence(self, step: Step, batch: Batch) -> dict[str, float | None]:
        """Log-loss of P, N, L and Q on this batch's unknown cells, where the truth is known (method.md section 3.1)."""
        if step.confidence is None:
            return {}
        cells = (batch.observed == 0) & (batch.truth != 0)
        target = (batch.truth > 0).double()
        result = {}
        for name, part in step.confidence._asdict().items():
            if part is not None:
                clamped = part.detach().double().clamp(1e-4, 1 - 1e-4)
                loss = torch.nn.functional.binary_cross_entropy(clamped, target, reduction="none")
                sums = sum_over_ranks(torch.stack([loss[cells].sum(), cells.sum().double()]), self._ranks)
                result[f"log_loss/{name}"] = _ratio(float(sums[0]), float(sums[1]))
        return result

    def state(self) -> dict[str, Any]:
        """Return the counts, and the sums of every rank, as a JSON tree. Collective."""
        window = self._window
        sums = {
            name: [str(value.dtype).removeprefix("torch."), gather_rows(value.reshape(1), self._ranks).tolist()]
            for name, value in sorted(window.parts.items())
        }
        return {"steps": window.steps, "samples": window.samples, "sums": sums}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the sums: of this rank, or of all where the number of ranks was another."""
        ranks, parts = self._ranks, {}
        for name, (dtype, values) in state["sums"].items():
            total = sum(values) if ranks.is_first else 0
            mine = values[ranks.rank] if len(values) == ranks.world_size else total
            parts[name] = torch.tensor(mine, dtype=getattr(torch, dtype), device=ranks.device)
        self._window = _Window(state["steps"], state["samples"], parts=parts)


def _measure(step: Step, batch: Batch) -> dict[str, Tensor]:
    """Return device sums of one micro-batch: loss parts, and pseudo-labels against the truth where it is known."""
    values = {f"loss/{name}": part for name, part in step.parts.items()} | {"loss/total": step.loss.detach()}
    values["known_cells"] = (batch.observed != 0).sum()
    if step.pseudo is not None:
        hidden = (batch.observed == 0) & (batch.truth != 0)
        positive = step.pseudo.positive & hidden
        values["pseudo/positives"] = step.pseudo.positive.sum()
        values["pseudo/checked"] = positive.sum()
        values["pseudo/right"] = (positive & (batch.truth > 0)).sum()
        values["pseudo/wanted"] = (hidden & (batch.truth > 0)).sum()
    return values


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
