"""The label graph: its adjacency from a correlation, and graph convolutions over it (method.md sections 2 and 3)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

_OFF_DIAGONAL, _DIAGONAL = 0.2, 0.8


def text_correlation(text_embeddings: Tensor) -> Tensor:
    """Return the Pearson correlation of class names' embeddings over their coordinates.

    Args:
        text_embeddings: [C, D].

    Returns:
        [C, C] fp32.
    """
    return torch.corrcoef(text_embeddings.float()) if len(text_embeddings) > 1 else torch.ones(1, 1)


def adjacency(correlation: Tensor, top_k: int) -> Tensor:
    """Return A_gcn: each class keeps its top-k positive correlations, scaled to 0.2 a row, and 0.8 for itself.

    Args:
        correlation: [C, C].
        top_k: entries kept a row; more than C - 1 keeps all.

    Returns:
        [C, C] fp32, rows sum to at most 1.
    """
    kept = _top_entries(correlation, top_k)
    scaled = _OFF_DIAGONAL * kept / kept.sum(1, keepdim=True).clamp_min(1e-12)
    return scaled + _DIAGONAL * torch.eye(len(scaled), device=scaled.device)


def propagation(correlation: Tensor, top_k: int, temperature: float) -> Tensor:
    """Return A_lab: row softmax of A_gcn / T over the kept entries, with which the `linear` confidence averages labels.

    Args:
        correlation: [C, C].
        top_k: entries kept a row.
        temperature: T.

    Returns:
        [C, C] fp32, rows sum to 1.
    """
    graph = adjacency(correlation, top_k)
    return torch.softmax((graph / temperature).masked_fill(graph == 0, -torch.inf), dim=1)


def _top_entries(correlation: Tensor, top_k: int) -> Tensor:
    off = correlation.float().clamp_min(0).fill_diagonal_(0)
    if top_k >= len(off) - 1:
        return off
    threshold = off.topk(top_k, dim=1).values[:, -1:]
    return torch.where(off >= threshold, off, 0.0)


class LabelGraph(nn.Module):
    """Three bias-free graph convolutions D -> 2D -> 2D -> D with a residual onto the text embeddings."""

    def __init__(self, width: int) -> None:
        """Start the last layer at zero, so that training begins at the zero-shot classifier (ours)."""
        super().__init__()
        sizes = (width, 2 * width, 2 * width, width)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))
        *inner, last = self.layers.parameters()
        for weight in inner:
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(last)

    def forward(self, text: Tensor, graph: Tensor) -> Tensor:
        """Return text embeddings [C, D] informed by their neighbours.

        Args:
            text: [C, D].
            graph: A_gcn [C, C].
        """
        weight_dtype = next(self.layers.parameters()).dtype
        hidden, graph = text.to(weight_dtype), graph.to(weight_dtype)
        for number, layer in enumerate(self.layers):
            hidden = graph @ layer(hidden)
            if number < len(self.layers) - 1:
                hidden = nn.functional.leaky_relu(hidden, 0.2)
        return text + hidden.to(text.dtype)
