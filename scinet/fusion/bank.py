"""The ring bank: embeddings and observed labels of the last M samples of all ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Neighbours(NamedTuple):
    """Rows that can be neighbours: embeddings [M, D], observed [M, C] int8, confidence [M, C], indices [M] int64."""

    embeddings: Tensor
    observed: Tensor
    confidence: Tensor
    indices: Tensor


class Bank:
    """A ring of M rows, written in global sample order so that it is equal on every rank.

    ``evidence`` needs observed labels only (one byte a cell, never stale); the confidence is kept where asked for.
    """

    def __init__(
        self, size: int, width: int, num_classes: int, *, keeps_confidence: bool, device: torch.device
    ) -> None:
        """Allocate once; memory is M (4 D + C + 8) bytes, and 4 M C more with the confidence."""
        columns = num_classes if keeps_confidence else 0
        self._rows = Neighbours(
            torch.zeros(size, width, device=device),
            torch.zeros(size, num_classes, dtype=torch.int8, device=device),
            torch.zeros(size, columns, device=device),
            torch.full((size,), -1, dtype=torch.int64, device=device),
        )
        self._next = 0
        self._filled = 0

    def rows(self) -> Neighbours:
        """Return the rows written so far."""
        return Neighbours(*(column[: self._filled] for column in self._rows))

    def append(self, batch: Neighbours) -> None:
        """Write the rows of a global batch over the oldest ones."""
        size = len(self._rows.indices)
        if size == 0:
            return
        newest = Neighbours(*(column[-size:] for column in batch))
        places = (self._next + torch.arange(len(newest.indices), device=newest.indices.device)) % size
        for column, new in zip(self._rows, newest, strict=True):
            if column.shape[-1]:
                column[places] = new.to(column.dtype)
        self._next = (self._next + len(newest.indices)) % size
        self._filled = min(self._filled + len(newest.indices), size)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the rows and their place."""
        return {**self._rows._asdict(), "place": torch.tensor([self._next, self._filled])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the state of another instance of the same sizes."""
        for name, column in self._rows._asdict().items():
            column.copy_(state[name])
        self._next, self._filled = (int(value) for value in state["place"])
