"""The EMA teacher: a copy of the student's trainable weights in fp32, never in the optimiser (method.md section 6)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from scinet.model.network import Network, Output


class Teacher:
    """Follows the student: ``teacher = decay * teacher + (1 - decay) * student`` after each step."""

    def __init__(self, student: Network, *, decay: float) -> None:
        """Copy the student.

        Args:
            student: not yet partitioned by an engine.
            decay: share of the teacher that a step keeps.
        """
        self.network = student.clone().float().eval()
        self.network.requires_grad_(False)
        self._decay = decay
        self._steps = 0

    def update(self, student: Network, whole: Callable[[nn.Parameter], AbstractContextManager[Tensor]]) -> None:
        """Move towards the student. Collective where parameters are partitioned.

        The first steps forget faster, or a short run would still be the untrained start at its end (ours).

        Args:
            student: after its step.
            whole: gives the whole of a partitioned parameter.
        """
        self._steps += 1
        decay = min(self._decay, self._steps / (self._steps + 10))
        with torch.no_grad():
            for mine, theirs in zip(self.network.parameters(), student.parameters(), strict=True):
                with whole(theirs) as value:
                    mine.lerp_(value.to(mine.dtype), 1 - decay)
            for buffer, source in zip(self.network.buffers(), student.buffers(), strict=True):
                buffer.copy_(source)

    def forward(self, inputs: Tensor) -> Output:
        """Run the teacher without gradient."""
        with torch.no_grad():
            output: Output = self.network(inputs)
        return output

    def state_dict(self) -> dict[str, Tensor]:
        """Return weights and the number of steps."""
        return {**self.network.state_dict(), "steps": torch.tensor(self._steps)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the state of another teacher of the same network."""
        self._steps = int(state["steps"])
        self.network.load_state_dict({key: value for key, value in state.items() if key != "steps"})
