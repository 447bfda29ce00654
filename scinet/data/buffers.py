"""Memory for batches that is used again."""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MOST_KEPT = 3
# in `take`: the list's, the loop variable's and getrefcount's own
_OWN_REFERENCES = 3


class Buffers:
    """Gives float32 memory, that of an earlier batch where nothing refers to it any more.

    Fresh memory comes from the system page by page, which takes longer than filling it with a batch.
    """

    def __init__(self) -> None:
        """Start without any."""
        self._arrays: list[npt.NDArray[np.float32]] = []

    def take(self, *shape: int) -> Tensor:
        """Return a tensor of a shape; what it holds is undefined.

        Every tensor that shares the memory, a slice or what autograd has saved, holds a reference to its array.
        """
        for array in self._arrays:
            if array.shape == shape and sys.getrefcount(array) == _OWN_REFERENCES:
                return torch.from_numpy(array)
        array = np.empty(shape, dtype=np.float32)
        self._arrays = [*self._arrays, array][-_MOST_KEPT:]
        return torch.from_numpy(array)
