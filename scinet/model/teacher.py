"""The EMA teacher: a copy of the student's trainable weights in fp32, never in the optimiser (method.md section 6).

Under ZeRO 3 it is partitioned as the student is: the average is taken on each rank's share, and a forward pass has
one layer whole at a time.
"""

from __future__ import annotations

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
        self.steps = 0

    def update(self, student: Network) -> None:
        """Move towards the student.

        The first steps forget faster, or a short run would still be the untrained start at its end (ours).

        Args:
            student: after its step, partitioned as the teacher is.
        """
        self.steps += 1
        decay = min(self._decay, self.steps / (self.steps + 10))
        with torch.no_grad():
            for mine, theirs in zip(self.network.parameters(), student.parameters(), strict=True):
                target, source = local(mine), local(theirs)
                target.lerp_(source.to(target.device, target.dtype), 1 - decay)
            for buffer, source in zip(self.network.buffers(), student.buffers(), strict=True):
                buffer.copy_(source)

    def forward(self, inputs: Tensor) -> Output:
        """Run the teacher without gradient."""
        with torch.no_grad():
            output: Output = self.network(inputs)
        return output


def local(parameter: nn.Parameter) -> Tensor:
    """Return the elements of a parameter that this rank holds: all of them, or its share under ZeRO 3."""
    share = getattr(parameter, "ds_tensor", None)
    return parameter.data if share is None else share.data
