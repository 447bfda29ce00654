"""The zoo's side of a training step: a recipe's loss on the student's outputs, and its memory after the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from scinet.data.batch import Batch
from scinet.distributed import Ranks, start_gather
from scinet.model.network import Output
from scinet.objective import Forward, Phase, Step
from scinet.zoo.recipe import Everyone, Recipe

_PREFIX = "zoo/"


class Sight:
    """The student's logits on the global batch of a step, before the step.

    With one micro-batch they are those that the loss is taken of. With several, each loss needs all of them, so the
    student passes over the others once more, without gradient.
    """

    def __init__(self, micro: Sequence[Batch], student: Forward, ranks: Ranks, *, has_gaps: bool) -> None:
        """Look at all micro-batches of this rank, where there are several. Collective."""
        self._micro, self._ranks, self._has_gaps = micro, ranks, has_gaps
        self._everyone: Everyone | None = None
        if len(micro) > 1:
            with torch.no_grad():
                self._take([student(batch.inputs).logits for batch in micro])

    def everyone(self, logits: Tensor) -> Everyone:
        """Return the rows of all ranks in global order. Collective at the first call.

        Args:
            logits: [V * B, C] of the only micro-batch; not looked at where there are several.
        """
        return self._everyone or self._take([logits])

    def _take(self, logits: list[Tensor]) -> Everyone:
        weak = [own[: len(batch.observed)] for own, batch in zip(logits, self._micro, strict=True)]
        columns = (
            torch.cat(weak),
            torch.cat([batch.observed for batch in self._micro]),
            torch.cat([batch.index for batch in self._micro]),
        )
        rows = start_gather(columns, self._ranks).rows()
        if self._has_gaps:
            is_sample = rows[2] >= 0
            rows = tuple(column[is_sample] for column in rows)
        self._everyone = Everyone(*rows)
        return self._everyone


class ZooObjective:
    """The loss of a method of the zoo, and the state that follows from a step."""

    def __init__(self, recipe: Recipe, ranks: Ranks) -> None:
        """Take the recipe."""
        self._recipe, self._ranks = recipe, ranks

    def look(self, micro: Sequence[Batch], teacher: Forward, student: Forward, *, has_gaps: bool) -> Sight | None:
        """Return what the recipe will see of the global batch, if it asks for it. Collective."""
        if not self._recipe.needs_everyone:
            return None
        return Sight(micro, student, self._ranks, has_gaps=has_gaps)

    def __call__(
        self, student: Output, batch: Batch, phase: Phase, size: float, look: Sight | None, place: int
    ) -> Step:
        """Return the loss of a micro-batch. Collective where the recipe needs the global batch."""
        everyone = None if look is None else look.everyone(student.logits)
        parts = self._recipe.loss(student.logits, batch, phase.epoch, everyone)
        total = torch.stack(list(parts.values())).sum() / size
        return Step(total, {name: part.detach() / size for name, part in parts.items()}, None, None)

    def update(self, look: Sight | None, phase: Phase) -> None:
        """Let the recipe remember a step that was taken."""
        if look is not None:
            # gathered by the losses of the step, which came first
            self._recipe.update(look.everyone(torch.empty(0)), phase.epoch)

    def end_epoch(self, epoch: int) -> None:
        """Let the recipe choose by what it remembers."""
        self._recipe.end_epoch(epoch)

    def fusion_seconds(self) -> list[float]:
        """Return nothing: the zoo fuses nothing."""
        return []

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the recipe remembers."""
        return {f"{_PREFIX}{name}": value for name, value in self._recipe.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the memory of another instance."""
        self._recipe.load_state_dict({name.removeprefix(_PREFIX): value for name, value in state.items()})
