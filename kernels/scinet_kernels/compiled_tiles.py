"""The blocked path's tiles in C (`native/gaussian.c`): how a problem is handed over, and how large its tiles are.

Shapes: B queries, M keys, D embedding, C classes.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from scinet_kernels import native
from scinet_kernels.native import pointer
from scinet_kernels.tiling import Frame, Problem, Sums, carve

# Rows of a tile by number of rows: large tiles make the products efficient, many tiles keep all threads busy and waste
# less on the diagonal's mirror image. They depend on sizes alone, so that the number of threads changes no result.
_TILE_ROWS = ((2048, 256), (512, 128), (128, 64), (0, 32))
# Columns by number of keys, where these are not the queries.
_TILE_COLUMNS = ((4096, 512), (0, 256))
# Packed rows take at most this share of the workspace, the threads' tiles the rest.
_PACKED_SHARE = 0.5

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64


def _structure(name: str, real: type, fields: list[tuple[str, type | None]]) -> type[ctypes.Structure]:
    """Mirror a struct of `gaussian.c`; a field without a type is a `real`."""
    return type(name, (ctypes.Structure,), {"_fields_": [(field, kind or real) for field, kind in fields]})


_PROBLEM: list[tuple[str, type | None]] = [
    *((name, _POINTER) for name in ("queries", "keys", "centre")),
    *((name, _INTEGER) for name in ("num_queries", "num_keys", "width")),
    *((name, _INTEGER) for name in ("query_stride", "query_step", "key_stride", "key_step")),
    ("scale", None),
    ("inverse", _POINTER),
    ("inverse_step", _INTEGER),
    ("query_ids", _POINTER),
    ("key_ids", _POINTER),
    ("limit", None),
    *((name, _INTEGER) for name in ("self_offset", "excludes_self", "is_symmetric")),
    ("values", _POINTER),
    ("weights", _POINTER),
    *((name, _INTEGER) for name in ("num_values", "block_rows", "block_columns", "packed_rows")),
    ("workspace", _POINTER),
    ("num_threads", _INTEGER),
    ("gemm", _POINTER),
]
_GRADIENTS: list[tuple[str, type | None]] = [
    ("signal", _POINTER),
    ("received", _POINTER),
    ("received_columns", _INTEGER),
    *((name, _POINTER) for name in ("row_towards", "row_total", "column_towards", "column_total", "spread")),
]
_STRUCTURES = {
    dtype: (_structure("Problem", real, _PROBLEM), _structure("Gradients", real, _GRADIENTS))
    for dtype, real in ((torch.float32, ctypes.c_float), (torch.float64, ctypes.c_double))
}


class Blocks(NamedTuple):
    """Rows and columns of a tile, rows packed at a time (a multiple of both), numbers of the workspace, threads."""

    rows: int
    columns: int
    packed: int
    workspace: int
    threads: int


def runs(problem: Problem, values: Tensor) -> bool:
    """Return whether the C routines take a problem: on a CPU, in one dtype, where they could be compiled.

    Args:
        problem: the operands.
        values: [M, C + 1] as the tiles will see them.

    """
    return values.device.type == "cpu" and values.dtype == problem.dtype and native.library(problem.dtype) is not None


def blocks_of(problem: Problem, num_tiles: int) -> Blocks:
    """Choose the sizes such that the workspace holds packed rows and at least one thread's tiles.

    Args:
        problem: the operands.
        num_tiles: tiles that a thread needs at once.

    """
    budget = problem.workspace_bytes // problem.dtype.itemsize
    num_rows, num_columns, width = len(problem.queries), len(problem.keys), problem.queries.shape[1] + 1
    rows = next(size for least, size in _TILE_ROWS if num_rows >= least)
    columns = rows if problem.is_symmetric else next(size for least, size in _TILE_COLUMNS if num_columns >= least)
    while rows * columns > 1 and num_tiles * rows * columns + 2 * max(rows, columns) * width > budget:
        rows, columns = max(1, rows // 2), max(1, columns // 2)
    unit = max(rows, columns)  # both are powers of two
    tiles = num_tiles * rows * columns
    for_packed = min(int(_PACKED_SHARE * budget), budget - tiles)
    num_ranges = 1
    packed = -(-max(num_rows, num_columns, 1) // unit) * unit
    if not problem.is_symmetric or packed * width > for_packed:
        num_ranges = 2
        packed = min(packed, max(unit, for_packed // (2 * width) // unit * unit))
    threads = min(torch.get_num_threads(), max(1, (budget - num_ranges * packed * width) // tiles))
    return Blocks(rows, columns, packed, num_ranges * packed * width + threads * tiles, threads)


def propagate(problem: Problem, frame: Frame, values: Tensor, weights: Tensor | None, sums: Tensor) -> None:
    """Add `sum_j S_ij v_j` of all keys to each query's row.

    Args:
        problem: the operands.
        frame: its frame.
        values: [M, C + 1] v = w [c, 1].
        weights: [M] w, or None: 1.
        sums: [B, C + 1].

    """
    given = _Given(problem, frame, values, weights, num_tiles=1)
    given.library.scinet_gaussian_forward(ctypes.byref(given.problem), _POINTER(pointer(sums)))


def differentiate(
    problem: Problem, frame: Frame, values: Tensor, weights: Tensor | None, signal: Tensor, sums: Sums,
    *, received_columns: int,
) -> None:  # fmt: skip
    """Add what all tiles give to the sums of the backward.

    Args:
        problem: the operands.
        frame: its frame.
        values: [M, C + 1] v = w [c, 1].
        weights: [M] w, or None: 1.
        signal: [B, C + 1].
        sums: contiguous, of the problem's dtype.
        received_columns: leading columns of `sums.received` that are wanted.

    """
    given = _Given(problem, frame, values, weights, num_tiles=2)
    rows, columns = sums.rows or (None, None), sums.columns or (None, None)
    gradients = _STRUCTURES[problem.dtype][1](
        signal=pointer(signal),
        received=pointer(sums.received),
        received_columns=received_columns,
        row_towards=pointer(rows[0]),
        row_total=pointer(rows[1]),
        column_towards=pointer(columns[0]),
        column_total=pointer(columns[1]),
        spread=pointer(sums.spread),
    )
    given.library.scinet_gaussian_backward(ctypes.byref(given.problem), ctypes.byref(gradients))


class _Given:
    """A problem as C takes it; keeps the tensors alive that the addresses point to."""

    def __init__(
        self, problem: Problem, frame: Frame, values: Tensor, weights: Tensor | None, *, num_tiles: int
    ) -> None:
        dtype, pairs = problem.dtype, problem.pairs
        library = native.library(dtype)
        assert library is not None
        self.library = library
        blocks = blocks_of(problem, num_tiles)
        queries = problem.queries.detach().to(dtype)
        keys = queries if problem.is_symmetric else problem.keys.detach().to(dtype)
        inverse = frame.inverse.new_ones(1) if frame.is_scaled else frame.inverse.contiguous()
        weights = values.new_ones(len(keys)) if weights is None else weights.contiguous()
        ids = [None if given is None else given.contiguous() for given in (pairs.query_ids, pairs.key_ids)]
        (workspace,) = carve([blocks.workspace], dtype, values.device)
        self._alive = queries, keys, frame.centre, inverse, weights, values, ids, workspace
        self.problem = _STRUCTURES[dtype][0](
            queries=pointer(queries),
            keys=pointer(keys),
            centre=pointer(frame.centre),
            num_queries=len(queries),
            num_keys=len(keys),
            width=queries.shape[1],
            query_stride=queries.stride(0),
            query_step=queries.stride(1),
            key_stride=keys.stride(0),
            key_step=keys.stride(1),
            scale=frame.unit.item(),
            inverse=pointer(inverse),
            inverse_step=int(len(inverse) > 1),
            query_ids=pointer(ids[0]),
            key_ids=pointer(ids[1]),
            limit=float("-inf") if pairs.radius is None else -0.5 * pairs.radius**2,
            self_offset=-1 if problem.self_offset is None else problem.self_offset,
            excludes_self=pairs.exclude_self,
            is_symmetric=problem.is_symmetric,
            values=pointer(values),
            weights=pointer(weights),
            num_values=values.shape[1] - 1,
            block_rows=blocks.rows,
            block_columns=blocks.columns,
            packed_rows=blocks.packed,
            workspace=pointer(workspace),
            num_threads=blocks.threads,
            gemm=native.gemm(dtype),
        )
