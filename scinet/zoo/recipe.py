"""What a method of the zoo is to the training loop: the loss of a micro-batch, and what it remembers.

Losses are sums over this rank's rows; what they depend on beyond those is the same on every rank: the global batch, or
tables keyed by sample index. Shapes: B rows of this rank, G of the global batch, V views, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scinet.data.batch import Batch
from scinet.errors import ConfigError


@dataclass(frozen=True)
class Everyone:
    """The global batch before its step: weak-view logits [G, C] without gradient, observed [G, C] int8, index [G]."""

    logits: Tensor
    observed: Tensor
    index: Tensor

    def places(self, batch: Batch) -> Tensor:
        """Return where the rows of a micro-batch lie: [B]; anywhere for a row without a sample.

        What is decided about a cell is decided here for all ranks: the last digit of a function of its logit may differ
        between two tensors, and with it a comparison.
        """
        return (batch.index.unsqueeze(1) == self.index).int().argmax(1)


class Recipe:
    """A method without memory that looks at nothing but its own rows, unless a subclass says otherwise."""

    needs_everyone = False
    """Whether loss or memory depend on the whole global batch."""

    def loss(self, logits: Tensor, batch: Batch, epoch: int, everyone: Everyone | None) -> dict[str, Tensor]:
        """Return the loss's parts, each a sum over this rank's samples.

        Args:
            logits: [V * B, C] fp32, view by view.
            batch: of B rows; those that are not valid count for nothing.
            epoch: finished epochs.
            everyone: the global batch, where it is needed.
        """
        raise NotImplementedError

    def update(self, everyone: Everyone, epoch: int) -> None:
        """Remember what the step saw; called on all ranks alike, only where ``needs_everyone``."""

    def end_epoch(self, epoch: int) -> None:
        """Choose by what is remembered, once the last step of an epoch, counted from 0, is taken or left out."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is remembered."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the memory of another instance of the same sizes."""
        for name, own in self.state_dict().items():
            own.copy_(state[name])


class CellRecipe(Recipe):
    """A loss that is a function of a cell's logit, label and the epoch alone."""

    def __init__(self, cells: Callable[[Tensor, Tensor, int], Tensor], *, sees_truth: bool = False) -> None:
        """Take the loss of every cell, from logits [B, C], observed [B, C] and the epoch to [B, C].

        Args:
            cells: the loss.
            sees_truth: it gets what the collection knows, before the mask.
        """
        self._cells, self._sees_truth = cells, sees_truth

    def loss(self, logits: Tensor, batch: Batch, epoch: int, everyone: Everyone | None) -> dict[str, Tensor]:
        """Return the sum over the cells of valid rows."""
        labels = batch.truth if self._sees_truth else batch.observed
        return {"supervised": over_valid(self._cells(logits, labels, epoch), batch)}


def over_valid(losses: Tensor, batch: Batch) -> Tensor:
    """Return the sum of losses [B] or [B, C] over the rows that hold a sample."""
    valid = batch.valid if losses.ndim == 1 else batch.valid.unsqueeze(1)
    return torch.where(valid, losses, 0.0).sum()


def table(num_samples: int, num_classes: int, fill: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a table of every sample's cells [N, C]."""
    return torch.full((num_samples, num_classes), fill, dtype=dtype, device=device)


def check_budget(method: str, cell_bytes: int, num_samples: int, num_classes: int, budget_mb: int) -> None:
    """Refuse tables that are larger than allowed.

    Raises:
        ConfigError: with the arithmetic.
    """
    megabytes = cell_bytes * num_samples * num_classes / 2**20
    if megabytes > budget_mb:
        raise ConfigError(
            f"method={method} keeps {cell_bytes} bytes of every label of every sample: {megabytes:.0f} MiB for "
            f"{num_samples} samples x {num_classes} classes on every rank, more than "
            f"zoo.memory_budget_mb={budget_mb}: raise it, or take a method without such a table"
        )
