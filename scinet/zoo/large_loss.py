"""LL-R, LL-Ct and LL-Cp: the unknown cells with the largest losses of the global batch are taken for positives."""

from __future__ import annotations

import torch
from torch import Tensor

from scinet.data.batch import Batch
from scinet.losses.large_loss import is_rejected, large_loss, rejected_cells, smallest_rejected_loss
from scinet.zoo.recipe import Everyone, Recipe, over_valid, table


class LargeLoss(Recipe):
    """Rejects (R), corrects for the step (Ct) or corrects for good (Cp)."""

    needs_everyone = True

    def __init__(self, percent: float, *, corrects: bool, corrected: Tensor | None) -> None:
        """Take Delta_rel in percent.

        Args:
            percent: of all cells.
            corrects: whether a rejected cell is a positive.
            corrected: [N, C] bool, the table of those that are so for good (Cp).
        """
        self._percent, self._corrects, self._corrected = percent, corrects, corrected

    @classmethod
    def permanent(cls, percent: float, *, num_samples: int, num_classes: int, device: torch.device) -> LargeLoss:
        """Return LL-Cp, with its table."""
        return cls(percent, corrects=True, corrected=table(num_samples, num_classes, 0, torch.bool, device))

    def _labels(self, observed: Tensor, index: Tensor) -> Tensor:
        if self._corrected is None:
            return observed
        return torch.where(self._corrected[index.clamp_min(0)], 1, observed)

    def _rejected(self, everyone: Everyone, epoch: int, *, strictly: bool = False) -> Tensor:
        """Return which cells of the global batch are rejected: [G, C] bool."""
        observed = self._labels(everyone.observed, everyone.index)
        is_permanent = self._corrected is not None
        count = rejected_cells(everyone.logits.numel(), self._percent, epoch, is_permanent=is_permanent)
        if not count:
            return torch.zeros_like(observed, dtype=torch.bool)
        smallest = smallest_rejected_loss(everyone.logits, observed, count)
        return is_rejected(everyone.logits, observed, smallest, strictly=strictly)

    def loss(self, logits: Tensor, batch: Batch, epoch: int, everyone: Everyone | None) -> dict[str, Tensor]:
        """Return the loss with rejected cells left out or turned."""
        assert everyone is not None
        observed = self._labels(batch.observed, batch.index)
        rejected = self._rejected(everyone, epoch)[everyone.places(batch)]
        return {"supervised": over_valid(large_loss(logits, observed, rejected, corrects=self._corrects), batch)}

    def update(self, everyone: Everyone, epoch: int) -> None:
        """Keep the corrections of Cp."""
        if self._corrected is not None:
            self._corrected[everyone.index] |= self._rejected(everyone, epoch, strictly=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the table of Cp."""
        return {} if self._corrected is None else {"corrected": self._corrected}
