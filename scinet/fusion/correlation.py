"""The label correlation, streamed: over known cells only, and over the confidence, shrunk to the text prior.

Method.md section 3. Updated with global batches in global order, hence equal on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from scinet.options import CorrelationOptions, CorrelationSource
from scinet_kernels import PearsonState

_EIGENVALUE_FLOOR = 0.02
_LEAST_KNOWN = 1e-3


class LabelCorrelation:
    """Co-moments of the labels with exponential forgetting.

    Forgetting makes counts mean samples: without it a second epoch would count each sample twice.
    """

    def __init__(
        self, text: Tensor, options: CorrelationOptions, *, samples_per_epoch: int, needs_confidence: bool
    ) -> None:
        """Start without observations.

        Args:
            text: [C, C] correlation of the text embeddings, the prior.
            options: the ``correlation`` section.
            samples_per_epoch: N, the unit of ``memory_epochs``.
            needs_confidence: whether the moments of the confidence are wanted too.
        """
        self._text, self._options = text.double(), options
        self._memory = options.memory_epochs * samples_per_epoch
        self._known = PearsonState(len(text), device=text.device)
        self._confidence = PearsonState(len(text), device=text.device) if needs_confidence else None
        self._rows = torch.zeros((), dtype=torch.float64, device=text.device)

    def update(self, observed: Tensor, confidence: Tensor | None) -> None:
        """Add a global batch.

        Args:
            observed: [G, C] in {+1, -1, 0}.
            confidence: Q [G, C], or None where only known cells are wanted.
        """
        decay = math.exp(-len(observed) / self._memory)
        known = observed != 0
        labels = (observed > 0).double()
        self._known.update(labels, known, decay=decay)
        self._rows.mul_(decay).add_(len(observed))
        if self._confidence is not None and confidence is not None:
            values = torch.where(known, labels, confidence.double())
            weights = torch.where(known, 1.0, self._options.unknown_weight).double()
            self._confidence.update(values, None, weights, decay=decay)

    def positive_rate(self) -> Tensor:
        """Return pi [C] fp32: each class's known positive rate, shrunk to the overall rate by one effective count."""
        rate, weight = self._known.mean()
        overall = ((rate * weight).sum() + 0.5) / (weight.sum() + 1.0)
        return ((rate * weight + overall) / (weight + 1.0)).clamp(1e-3, 1 - 1e-3).float()

    def lacks_negatives(self) -> Tensor:
        """Return the classes of which positives alone are known: [C] bool; none before the first sample.

        Where no class at all has a known negative, those without a known positive too.
        """
        rate, weight = self._known.mean()
        has_none = (1 - rate) * weight < _LEAST_KNOWN
        has_positives = rate * weight >= _LEAST_KNOWN
        return (self._rows > 0) & has_none & (has_positives | has_none.all())

    def positive_share(self) -> Tensor:
        """Return the share of all samples in which each class is known to be present: [C] fp32."""
        rate, weight = self._known.mean()
        return (rate * weight / self._rows.clamp_min(1.0)).float()

    def known_correlation(self, shrinkage: float) -> Tensor:
        """Return R [C, C] fp32 over known cells: shrunk to 0 where seldom observed, and positive definite.

        Args:
            shrinkage: co-observations at which a correlation is halved.
        """
        correlation, count = self._known.correlation()
        shrunk = correlation * count / (count + shrinkage).clamp_min(1e-12)
        shrunk.fill_diagonal_(1.0)
        values, vectors = torch.linalg.eigh(shrunk)
        floored: Tensor = vectors * values.clamp_min(_EIGENVALUE_FLOOR) @ vectors.T
        return floored.float()

    def shrunk(self) -> Tensor:
        """Return Rho [C, C] fp32, from the configured source."""
        if self._options.source is CorrelationSource.text:
            return self._text.float()
        state = self._known if self._confidence is None else self._confidence
        correlation, count = state.correlation()
        if self._options.source is CorrelationSource.confidence:
            return correlation.float()
        prior = self._options.shrinkage
        return ((count * correlation + prior * self._text) / (count + prior).clamp_min(1e-12)).float()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the prior, the number of samples and the moments."""
        parts = {"known": self._known} | ({"confidence": self._confidence} if self._confidence else {})
        moments = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
        return {"text": self._text, "rows": self._rows, **moments}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the state of another instance."""
        self._text.copy_(state["text"])
        self._rows.copy_(state["rows"])
        for name, part in (("known", self._known), ("confidence", self._confidence)):
            if part is not None:
                prefix = f"{name}."
                part.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
