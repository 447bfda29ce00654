"""Training state in pieces: which elements a rank writes, and how any layout puts them together again.

A piece is a stretch of a flattened tensor. What all ranks hold alike is laid end to end and cut into equal shares, one
a rank; what ZeRO has partitioned is written as it lies. A reader asks for stretches, whoever wrote them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scinet.distributed import Ranks
from scinet.errors import CheckpointError
from scinet.layout import Part

_AT = "@"


def own(parts: Iterable[Part], ranks: Ranks) -> dict[str, Tensor]:
    """Return copies on the CPU of the pieces that this rank writes, by name and first element.

    Args:
        parts: all that this rank holds; shared ones in the same order on every rank.
        ranks: this process.
    """
    parts = list(parts)
    shared = [part for part in parts if part.is_shared]
    total = sum(part.numel * part.dtype.itemsize for part in shared)
    low, high = (total * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
    stretches = [(part, 0, part.numel) for part in parts if not part.is_shared]
    offset = 0
    for part in shared:
        size = part.dtype.itemsize
        begin, end = (min(max(-(-(at - offset) // size), 0), part.numel) for at in (low, high))
        stretches.append((part, begin, end))
        offset += part.numel * size
    # a tensor without elements is written by the first rank, so that a reader finds every name
    return {
        f"{part.name}{_AT}{part.start + begin}": part.read()[begin:end].to("cpu", copy=True)
        for part, begin, end in stretches
        if begin < end or (part.is_shared and not part.numel and ranks.is_first)
    }


class Reader:
    """The pieces of all files of a checkpoint."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Look what is in the files.

        Raises:
            CheckpointError: if one is not what it should be.
        """
        self._pieces: dict[str, list[tuple[int, int, Any, str]]] = {}
        try:
            for path in paths:
                file: Any = safe_open(str(path), framework="pt")
                for key in file.keys():  # noqa: SIM118 - no mapping
                    name, _, start = key.rpartition(_AT)
                    numel = file.get_slice(key).get_shape()[0]
                    self._pieces.setdefault(name, []).append((int(start), int(start) + numel, file, key))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def fill(self, part: Part) -> None:
        """Replace a part's elements by the saved ones.

        Raises:
            CheckpointError: if some are missing.
        """
        values = torch.empty(part.numel, dtype=part.dtype)
        filled = 0
        for begin, end, saved in self._overlaps(part):
            values[begin - part.start : end - part.start] = saved
            filled += end - begin
        if filled != part.numel or part.name not in self._pieces:
            raise CheckpointError(f"'{part.name}' has {filled} of {part.numel} elements")
        part.write(values)

    def _overlaps(self, part: Part) -> Iterator[tuple[int, int, Tensor]]:
        for first, last, file, key in self._pieces.get(part.name, []):
            begin, end = max(first, part.start), min(last, part.start + part.numel)
            if begin < end:
                yield begin, end, file.get_slice(key)[begin - first : end - first]
