"""The blocked moments in C (`native/moments.c`): how cells are handed over.

Shapes: N rows, C classes.
"""

import ctypes

import torch
from torch import Tensor

from scinet_kernels import native
from scinet_kernels.native import pointer
from scinet_kernels.tiling import carve

# Beyond this the products are large, and torch's own threads do them as well in less memory.
_MOST_CLASSES = 512


class _Cells(ctypes.Structure):
    """Mirrors `cells_t` of `moments.c`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "known", "weights")),
        *((f"{name}_{kind}", ctypes.c_int64) for name in ("value", "known", "weight") for kind in ("stride", "step")),
        ("pivot", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_classes", "block_rows")),
        ("workspace", ctypes.c_void_p),
        ("num_threads", ctypes.c_int64),
        ("gemm", ctypes.c_void_p),
    )


def runs(values: Tensor) -> bool:
    """Return whether the C routines take these values: on a CPU, where they could be compiled, not too wide.

    Args:
        values: [N, C] floating point.

    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    return values.device.type == "cpu" and values.shape[1] <= _MOST_CLASSES and native.library(dtype) is not None


def moments(values: Tensor, known: Tensor | None, weights: Tensor | None, pivot: Tensor, block_rows: int) -> Tensor:
    """Sum the four moments of every pair of columns.

    Args:
        values: [N, C] floating point.
        known: [N, C] bool or None.
        weights: [N, C] floating point or None.
        pivot: [C] in the dtype of the products.
        block_rows: rows that one product contracts.

    Returns:
        [4, C, C] float64: n, sx, sxx, sxy.

    """
    num_classes = len(pivot)
    sums = torch.zeros(4, num_classes, num_classes, dtype=torch.float64)
    _call("scinet_moments", sums, values, known, weights, pivot, block_rows)
    return sums


def column_sums(values: Tensor, known: Tensor | None, weights: Tensor | None, pivot: Tensor, block_rows: int) -> Tensor:
    """Sum weighted differences to the pivot, and cell weights, over each column's known cells.

    Args:
        values: [N, C] floating point.
        known: [N, C] bool or None.
        weights: [N, C] floating point or None.
        pivot: [C] in the dtype of the products.
        block_rows: rows that a thread takes at once.

    Returns:
        [2, C] float64: sum w, sum w z.

    """
    sums = torch.zeros(2, len(pivot), dtype=torch.float64)
    _call("scinet_column_sums", sums, values, known, weights, pivot, block_rows)
    return sums


def _call(
    function: str, sums: Tensor, values: Tensor, known: Tensor | None, weights: Tensor | None, pivot: Tensor,
    block_rows: int,
) -> None:  # fmt: skip
    library = native.library(pivot.dtype)
    assert library is not None
    values = values.detach().to(pivot.dtype)
    weights = None if weights is None else weights.detach().to(pivot.dtype)
    num_rows, num_classes = values.shape
    block_rows = max(1, min(block_rows, num_rows))
    threads = max(1, min(torch.get_num_threads(), -(-num_rows // block_rows)))
    size = block_rows * 3 * num_classes + 4 * num_classes**2
    (workspace,) = carve([threads * size], pivot.dtype, values.device)
    strides = [(0, 0) if given is None else given.stride() for given in (values, known, weights)]
    cells = _Cells(
        *map(pointer, (values, known, weights)),
        *(step for pair in strides for step in pair),
        pointer(pivot),
        num_rows,
        num_classes,
        block_rows,
        pointer(workspace),
        threads,
        native.gemm(pivot.dtype),
    )
    getattr(library, function)(ctypes.byref(cells), ctypes.c_void_p(sums.data_ptr()))
