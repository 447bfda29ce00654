"""SCPNet: self-paced correction on the weak view, and consistency of the strong view with it over the label graph."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from scinet.data.batch import Batch
from scinet.fusion.thresholds import DynamicThresholds
from scinet.losses.robust import self_paced
from scinet.losses.supervised import binary_cross_entropy
from scinet.options import LossOptions
from scinet.zoo.recipe import Everyone, Recipe, over_valid
from scinet.zoo_options import RobustOptions


class StructuredConsistency(Recipe):
    """SCPNet (Ding et al., CVPR 2023), on two views.

    The source takes pseudo-labels from a second weak view; here the weak view gives them itself. Its counts are of all
    positive labels that the strong view gets, known ones too, as in the source's code; SCINet's of pseudo-positives.
    """

    needs_everyone = True

    def __init__(
        self, loss: LossOptions, robust: RobustOptions, relation: Tensor, thresholds: DynamicThresholds
    ) -> None:
        """Take the row-stochastic relation R [C, C] of the class names."""
        self._loss, self._robust, self._relation, self._thresholds = loss, robust, relation, thresholds

    def loss(self, logits: Tensor, batch: Batch, epoch: int, everyone: Everyone | None) -> dict[str, Tensor]:
        """Return supervised loss and both consistency losses."""
        assert everyone is not None
        weak, strong = logits.chunk(2)
        robust, loss, observed = self._robust, self._loss, batch.observed
        supervised = self_paced(
            weak,
            observed,
            threshold=robust.threshold,
            margin=robust.margin,
            gamma=robust.gamma,
            corrects=epoch >= robust.start,
        )
        probabilities = torch.sigmoid(everyone.logits)[everyone.places(batch)]
        labels, is_confident, _ = self._thresholds.pseudo_labels(probabilities, observed)
        rows = (is_confident & batch.valid).float().unsqueeze(1).expand_as(weak)
        labels = labels.to(strong.dtype)  # torch's cross-entropy rounds to its targets' dtype
        weight = loss.unlabelled_weight
        related = (probabilities @ self._relation.T).clamp(0, 1)
        return {
            "supervised": over_valid(supervised, batch),
            "consistency": weight * binary_cross_entropy(strong, labels, rows),
            "relation": weight * loss.distillation_weight * binary_cross_entropy(strong, related, rows),
        }

    def update(self, everyone: Everyone, epoch: int) -> None:
        """Count the positive labels."""
        labels, _, _ = self._thresholds.pseudo_labels(torch.sigmoid(everyone.logits), everyone.observed)
        self._thresholds.update(labels > 0)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counts."""
        return self._thresholds.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the counts of another instance."""
        self._thresholds.load_state_dict(dict(state))
