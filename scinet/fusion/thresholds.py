"""Dynamic thresholds per class and the pseudo-labels they admit (method.md section 4; FlexMatch, SCPNet)."""

from __future__ import annotations

import torch
from torch import Tensor

_HIGHEST = 0.95


class DynamicThresholds:
    """Counts pseudo-positives among the last ``window`` samples of all ranks; equal on every rank."""

    def __init__(self, num_classes: int, *, hard_k: int, window: int, device: torch.device) -> None:
        """Start with no sample seen, hence with the lowest thresholds."""
        self._hard_k = hard_k
        self._ring = torch.zeros(window, num_classes, dtype=torch.bool, device=device)
        self._next = 0
        self._seen = 0

    def thresholds(self) -> Tensor:
        """Return T_c = 0.95 beta_c / (2 - beta_c): [C] fp32."""
        counts = self._ring.sum(0).float()
        seen = min(self._seen, len(self._ring))
        scale = torch.maximum(counts.max(), self._hard_k * seen - counts.sum()).clamp_min(1.0)
        beta = (counts / scale).clamp_min(1.0 / counts.numel())
        return _HIGHEST * beta / (2 - beta)

    def pseudo_labels(self, probabilities: Tensor, observed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return hard labels, which images they hold for, and which cells are pseudo-positive.

        Args:
            probabilities: [B, C], detached.
            observed: [B, C] in {+1, -1, 0}; known cells override.

        Returns:
            labels [B, C] fp32 in {0, 1}; confident [B] bool, whether a top-K class passed; pseudo [B, C] bool,
            the unknown cells that became positive.
        """
        top = torch.zeros_like(probabilities, dtype=torch.bool)
        k = min(self._hard_k, probabilities.shape[1])
        top.scatter_(1, probabilities.topk(k, dim=1).indices, True)
        passed = top & (probabilities >= self.thresholds())
        labels = torch.where(observed == 0, passed, observed > 0)
        return labels.float(), passed.any(1), passed & (observed == 0)

    def update(self, passed: Tensor) -> None:
        """Count the global batch's pseudo-positives [G, C] bool, in global sample order."""
        if not len(passed):
            return
        rows = (self._next + torch.arange(len(passed), device=passed.device)) % len(self._ring)
        self._ring[rows[-len(self._ring) :]] = passed[-len(self._ring) :]
        self._next = int(rows[-1] + 1) % len(self._ring)
        self._seen += len(passed)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counts and their place."""
        return {"ring": self._ring, "place": torch.tensor([self._next, self._seen])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the state of another instance of the same sizes."""
        self._ring.copy_(state["ring"])
        self._next, self._seen = (int(value) for value in state["place"])
