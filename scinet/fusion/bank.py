"""The bank: embeddings, regions and observed labels of past training samples of all ranks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from scinet.model.network import Output
from scinet.model.regions import resampled

GRID = 4
"""Regions of an image are kept as means over a grid of GRID x GRID; of at most what a feature cache holds."""


class Neighbours(NamedTuple):
    """Rows that can be neighbours, or that look for them.

    embeddings [M, D], observed [M, C] int8, confidence [M, C], indices [M] int64; regions [M, R, D] fp16, unit vectors,
    and choice [M, C] uint8, the region that speaks most for each class. R is 0 where the towers show no regions.
    """

    embeddings: Tensor
    observed: Tensor
    confidence: Tensor
    indices: Tensor
    regions: Tensor
    choice: Tensor

    def at(self, rows: Tensor | slice) -> Neighbours:
        """Return some of the rows."""
        return Neighbours(*(column[rows] for column in self))


def blank(
    size: int,
    num_classes: int,
    width: int,
    *,
    confidence: int = 0,
    regions: int = 0,
    device: torch.device | None = None,
) -> Neighbours:
    """Return ``size`` rows of zeros without a sample: indices are -1, columns that are not asked for have width 0."""
    return Neighbours(
        torch.zeros(size, width, device=device),
        torch.zeros(size, num_classes, dtype=torch.int8, device=device),
        torch.zeros(size, confidence, device=device),
        torch.full((size,), -1, dtype=torch.int64, device=device),
        torch.zeros(size, regions, width, dtype=torch.float16, device=device),
        torch.zeros(size, num_classes if regions else 0, dtype=torch.uint8, device=device),
    )


def plain_rows(embeddings: Tensor, observed: Tensor, confidence: Tensor, indices: Tensor) -> Neighbours:
    """Return rows without regions."""
    return blank(len(indices), observed.shape[1], embeddings.shape[1], device=embeddings.device)._replace(
        embeddings=embeddings, observed=observed, confidence=confidence, indices=indices
    )


def rows_of(output: Output, observed: Tensor, indices: Tensor, *, num_regions: int) -> Neighbours:
    """Return what a network says of a batch as rows of a bank; the confidence is its probability.

    Args:
        output: of the network.
        observed: [B, C] in {+1, -1, 0}.
        indices: [B] of the samples.
        num_regions: R, a square number; 0 keeps none.
    """
    rows = plain_rows(output.embeddings, observed, torch.sigmoid(output.logits), indices)
    if output.regions is None or output.text is None or not num_regions:
        return rows
    regions = torch.nn.functional.normalize(output.regions, dim=-1)
    if regions.shape[1] != num_regions:
        regions = torch.nn.functional.normalize(resampled(regions, math.isqrt(num_regions)), dim=-1)
    return rows._replace(regions=regions.half(), choice=choose_regions(regions, output.text))


def choose_regions(regions: Tensor, text: Tensor) -> Tensor:
    """Return each class's region of the largest relative score: its score minus the mean of the other classes' there.

    Args:
        regions: [B, R, D] unit vectors.
        text: [C, D] unit vectors.

    Returns:
        [B, C] uint8.

    Source: method.md section 3.3.
    """
    scores = regions @ text.T
    others = (scores.sum(2, keepdim=True) - scores) / max(1, len(text) - 1)
    return (scores - others).argmax(1).to(torch.uint8)


class Bank:
    """M rows, written in global sample order so that they are equal on every rank.

    A sample that comes again takes the place of its older row; a new one that of the oldest. As a ``ring`` (the banks
    of earlier versions) every row takes the place of the oldest, and a sample can be there twice.
    """

    def __init__(self, rows: Neighbours, *, num_samples: int, is_ring: bool = False) -> None:
        """Take the memory.

        Args:
            rows: as many blank ones as the bank may hold.
            num_samples: size of the sample index.
            is_ring: as above.
        """
        self._rows = rows
        self._places = None if is_ring else torch.full((num_samples,), -1, device=rows.indices.device)
        self._next = 0
        self._filled = 0

    def __len__(self) -> int:
        """Return the rows written so far."""
        return self._filled

    def rows(self) -> Neighbours:
        """Return the rows written so far."""
        return self._rows.at(slice(self._filled))

    def append(self, batch: Neighbours) -> None:
        """Write the rows of a global batch."""
        size = len(self._rows.indices)
        if size == 0:
            return
        newest = batch.at(slice(-size, None))
        places = self._take_places(newest.indices)
        for column, new in zip(self._rows, newest, strict=True):
            if column.shape[1:].numel():  # what the bank does not keep has no width
                column[places] = new.to(column.dtype)

    def _take_places(self, indices: Tensor) -> Tensor:
        """Return where the rows of samples are to be written: [G]."""
        size = len(self._rows.indices)
        if self._places is None:
            oldest = (self._next + torch.arange(len(indices), device=indices.device)) % size
            self._next = (self._next + len(indices)) % size
            self._filled = min(self._filled + len(indices), size)
            return oldest
        own = self._places[indices]
        is_new = own < 0
        num_new = int(is_new.sum())
        oldest = (self._next + torch.arange(min(size, num_new + len(own)), device=own.device)) % size
        oldest = oldest[~torch.isin(oldest, own)][:num_new]
        own[is_new] = oldest
        evicted = self._rows.indices[oldest]
        self._places[evicted[evicted >= 0]] = -1
        self._places[indices] = own
        if num_new:
            self._next = (int(oldest[-1]) + 1) % size
        self._filled = min(self._filled + num_new, size)
        return own

    def state_dict(self) -> dict[str, Tensor]:
        """Return the rows and their place."""
        return {**self._held(), "place": torch.tensor([self._next, self._filled])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the state of another instance of the same sizes."""
        for name, column in self._held().items():
            column.copy_(state[name])
        self._next, self._filled = (int(value) for value in state["place"])
        if self._places is not None:
            held = self._rows.indices[: self._filled]
            self._places.fill_(-1)
            self._places[held] = torch.arange(len(held), device=held.device)

    def _held(self) -> dict[str, Tensor]:
        # a confidence without columns is what checkpoints of earlier versions hold
        rows = self._rows._asdict()
        return {name: column for name, column in rows.items() if name == "confidence" or column.shape[1:].numel()}
