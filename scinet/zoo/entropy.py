"""EM with pseudo-labels: soft negatives that the model chooses (APL), or positives that the untrained towers see."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scinet.data.batch import Batch
from scinet.losses.assumed import negative_log
from scinet.losses.entropy import entropy_maximisation, soft_negatives
from scinet.zoo.recipe import Everyone, Recipe, over_valid, table
from scinet.zoo_options import EntropyOptions

_TRUST = 0.9  # share of a pseudo-positive's target that is positive


class SoftNegatives(Recipe):
    """EM + APL: from a share of the epochs on, the least likely unknown cells of each class become soft negatives.

    An epoch's own predictions choose them, where the source scores the training set once more. A chosen cell stays so.
    """

    needs_everyone = True
    CELL_BYTES = 8
    """The last prediction and the target."""

    def __init__(
        self, options: EntropyOptions, *, num_epochs: int, num_samples: int, num_classes: int, device: torch.device
    ) -> None:
        """Start without a soft negative; NaN stands for a cell that is known, unseen or not chosen."""
        self._options, self._num_epochs = options, num_epochs
        self._first = round(options.start * num_epochs)
        self._seen = table(num_samples, num_classes, torch.nan, torch.float32, device)
        self._targets = torch.full_like(self._seen, torch.nan)

    def loss(self, logits: Tensor, batch: Batch, epoch: int, everyone: Everyone | None) -> dict[str, Tensor]:
        """Return the loss of known cells, soft negatives and the rest."""
        targets = self._targets[batch.index.clamp_min(0)]
        is_soft = (batch.observed == 0) & ~targets.isnan()
        soft = soft_negatives(logits, targets.nan_to_num(), weight=self._options.negative_weight)
        rest = entropy_maximisation(logits, batch.observed, weight=self._options.weight)
        return {"supervised": over_valid(torch.where(is_soft, soft, rest), batch)}

    def update(self, everyone: Everyone, epoch: int) -> None:
        """Keep the predictions."""
        unknown = everyone.observed == 0
        self._seen[everyone.index] = torch.where(unknown, torch.sigmoid(everyone.logits), torch.nan)

    def end_epoch(self, epoch: int) -> None:
        """Make a share of each class's unknown cells, its least likely ones, soft negatives."""
        if not self._first <= epoch + 1 < self._num_epochs:
            return
        share = self._options.negatives / (self._num_epochs - max(self._first, 1))
        for place in range(self._seen.shape[1]):  # a class at a time: the table may be most of the memory
            seen, targets = self._seen[:, place], self._targets[:, place]
            free = torch.where(targets.isnan(), seen, torch.nan)
            wanted, left = (share * (~seen.isnan()).sum()).long(), (~free.isnan()).sum()
            chosen = free.argsort(stable=True)[: int(torch.minimum(wanted, left))]  # NaN sorts last
            targets[chosen] = free[chosen]

    def state_dict(self) -> dict[str, Tensor]:
        """Return predictions and targets."""
        return {"seen": self._seen, "targets": self._targets}


class TowersPositives(Recipe):
    """VLPL: a class that the untrained towers are sure to see is a pseudo-positive; entropy on the rest."""

    def __init__(self, options: EntropyOptions, cosines: Callable[[Tensor], Tensor]) -> None:
        """Take the untrained network, from inputs to cosines [B, C]."""
        self._options, self._cosines = options, cosines

    def loss(self, logits: Tensor, batch: Batch, epoch: int, everyone: Everyone | None) -> dict[str, Tensor]:
        """Return the loss of known cells, pseudo-positives and the rest."""
        options = self._options
        with torch.no_grad():
            zero_shot = torch.softmax(self._cosines(batch.inputs) / options.temperature, dim=1)
        is_pseudo = (batch.observed == 0) & (zero_shot > options.threshold)
        trusted = _TRUST * negative_log(logits) + (1 - _TRUST) * negative_log(-logits)
        rest = entropy_maximisation(logits, batch.observed, weight=options.weight)
        cells = torch.where(is_pseudo, options.positive_weight * trusted, rest)
        return {"supervised": over_valid(cells, batch)}
