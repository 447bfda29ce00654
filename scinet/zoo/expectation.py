"""EPR and ROLE: losses that know how many positives an image has on average."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scinet.data.batch import Batch
from scinet.data.masks import derive
from scinet.losses.assumed import known_cells
from scinet.losses.expectation import expected_positives, towards_estimates
from scinet.zoo.recipe import Everyone, Recipe, over_valid, table

_KNOWN_LOGIT = math.log(0.995 / 0.005)
_LARGEST_START = math.log(0.6 / 0.4)
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


def _mean_positives(logits: Tensor) -> Tensor:
    """Return the mean over the rows [G, C] of an image's summed probabilities."""
    return torch.sigmoid(logits).sum(1).mean()


class ExpectedPositives(Recipe):
    """EPR: cross-entropy on known cells, and a pull of the mean number of predicted positives."""

    needs_everyone = True

    def __init__(self, expected: float) -> None:
        """Take k, the positives that an image has on average."""
        self._expected = expected

    def loss(self, logits: Tensor, batch: Batch, epoch: int, everyone: Everyone | None) -> dict[str, Tensor]:
        """Return the known cells' loss and the regulariser."""
        assert everyone is not None
        pull = expected_positives(logits, expected=self._expected, mean=_mean_positives(everyone.logits))
        return {
            "supervised": over_valid(known_cells(logits, batch.observed), batch),
            "expected_positives": over_valid(pull, batch),
        }


class LabelEstimates(Recipe):
    """ROLE: classifier and a table of label estimates learn from each other.

    The estimates have an Adam of their own, which moves the rows of a step only; the source's also moves the others, by
    what is left of their momentum. Every rank keeps the whole table and moves it alike.
    """

    needs_everyone = True
    CELL_BYTES = 12
    """An estimate and its two moments."""

    def __init__(
        self,
        expected: float,
        learning_rate: float,
        *,
        num_samples: int,
        num_classes: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """Start the estimates uniformly in +- logit(0.6); known cells are set at their first sight."""
        self._expected, self._learning_rate = expected, learning_rate
        generator = torch.Generator().manual_seed(derive(seed, "label estimates"))
        start = torch.rand(num_samples, num_classes, generator=generator) * 2 - 1
        self._estimates = (_LARGEST_START * start).to(device)
        self._first, self._second = (table(num_samples, num_classes, 0.0, torch.float32, device) for _ in range(2))
        self._updates = torch.zeros(num_samples, 1, dtype=torch.int64, device=device)

    def _rows(self, index: Tensor, observed: Tensor) -> Tensor:
        index = index.clamp_min(0)
        is_new = (self._updates[index] == 0) & (observed != 0)
        return torch.where(is_new, _KNOWN_LOGIT * observed.sign(), self._estimates[index])

    def loss(self, logits: Tensor, batch: Batch, epoch: int, everyone: Everyone | None) -> dict[str, Tensor]:
        """Return the classifier's half; the estimates' is in the update."""
        assert everyone is not None
        estimates = torch.sigmoid(self._rows(batch.index, batch.observed))
        pull = expected_positives(logits, expected=self._expected, mean=_mean_positives(everyone.logits))
        return {
            "supervised": over_valid(towards_estimates(logits, estimates, batch.observed), batch),
            "expected_positives": 0.5 * over_valid(pull, batch),
        }

    def update(self, everyone: Everyone, epoch: int) -> None:
        """Let the estimates of the step's samples learn from the classifier."""
        index = everyone.index
        rows = self._rows(index, everyone.observed).detach().requires_grad_()
        with torch.enable_grad():
            towards = towards_estimates(rows, torch.sigmoid(everyone.logits), everyone.observed).sum()
            loss = towards + 0.5 * expected_positives(rows, expected=self._expected).sum()
            (gradient,) = torch.autograd.grad(loss / len(index), rows)
        count = self._updates[index] + 1
        first = self._first[index].lerp(gradient, 1 - _BETAS[0])
        second = self._second[index].lerp(gradient.square(), 1 - _BETAS[1])
        unbiased = first / (1 - _BETAS[0] ** count), (second / (1 - _BETAS[1] ** count)).sqrt()
        self._estimates[index] = rows.detach() - self._learning_rate * unbiased[0] / (unbiased[1] + _EPSILON)
        self._first[index], self._second[index], self._updates[index] = first, second, count

    def state_dict(self) -> dict[str, Tensor]:
        """Return estimates and moments."""
        return {
            "estimates": self._estimates,
            "first": self._first,
            "second": self._second,
            "updates": self._updates,
        }
