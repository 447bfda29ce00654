"""P-ASL: unknown cells are negatives unless their class is common or they are among the likeliest of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from scinet.data.batch import Batch
from scinet.losses.selective import Focus, is_selected, least_likely_positive, partial_asymmetric
from scinet.zoo.recipe import Everyone, Recipe, over_valid
from scinet.zoo_options import SelectiveOptions


class Selective(Recipe):
    """Trains on known cells for a share of the epochs, which gives the class priors, and then selects by them.

    The source trains a first model to the end for the priors, and a second one with them.
    """

    needs_everyone = True

    def __init__(
        self, options: SelectiveOptions, *, num_prior_epochs: int, num_classes: int, device: torch.device
    ) -> None:
        """Start without priors."""
        self._options, self._num_prior_epochs = options, num_prior_epochs
        self._focus = Focus(options.focus_positive, options.focus_negative, options.focus_unknown)
        self._sum = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.float64, device=device)

    def loss(self, logits: Tensor, batch: Batch, epoch: int, everyone: Everyone | None) -> dict[str, Tensor]:
        """Return the loss of the selected cells."""
        assert everyone is not None
        selected = batch.observed != 0
        if epoch >= self._num_prior_epochs:
            seen = torch.sigmoid(everyone.logits)
            count = self._options.ignored * len(seen)
            least = least_likely_positive(seen, everyone.observed, count)
            common = self._sum > self._options.common * self._count
            selected = is_selected(seen, everyone.observed, least, common=common)[everyone.places(batch)]
        return {
            "supervised": over_valid(partial_asymmetric(logits, batch.observed, selected, focus=self._focus), batch)
        }

    def update(self, everyone: Everyone, epoch: int) -> None:
        """Add to the mean predictions while they are formed."""
        if epoch < self._num_prior_epochs:
            self._sum += torch.sigmoid(everyone.logits).double().sum(0)
            self._count += len(everyone.index)

    def state_dict(self) -> dict[str, Tensor]:
        """Return sum and count of the predictions."""
        return {"sum": self._sum, "count": self._count}
