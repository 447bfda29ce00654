"""The Pearson moments as one Triton kernel; imported only where it is launched or compiled.

Shapes: N rows, C classes (columns). A program takes a tile of column pairs and a split of the rows, and writes two of
the four moments: with all four at once the products of split fp32 numbers spill registers. It reads values and mask as
they were given, subtracts the pivot and selects unknown cells away. There are no atomics: every split has its own
partial sums, which are added in float64 in index order. Source: kernels.md sections 2, 5.3 and 5.5.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scinet_kernels import tiles
from scinet_kernels.dispatch import is_interpreting
from scinet_kernels.moments import BLOCK_ROWS
from scinet_kernels.tiles import Tile

_PARTIAL_BYTES = 64 << 20


@triton.jit
def _read(
    values_ptr, known_ptr, weights_ptr, pivot, n, c, inside, strides, HAS_KNOWN: tl.constexpr, HAS_WEIGHTS: tl.constexpr
):
    """Read a tile of cells: w and z, both 0 where unknown or outside; selected, so that NaN stays out."""
    stride_vn, stride_vc, stride_kn, stride_kc, stride_wn, stride_wc = strides
    is_known = inside
    if HAS_KNOWN:
        is_known &= tl.load(known_ptr + n * stride_kn + c * stride_kc, mask=inside, other=0) != 0
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + n * stride_wn + c * stride_wc, mask=inside, other=0.0).to(tl.float32)
        is_known &= weight > 0
        weight = tl.where(is_known, weight, 0.0)
    else:
        weight = tl.where(is_known, 1.0, 0.0)
    value = tl.load(values_ptr + n * stride_vn + c * stride_vc, mask=inside, other=0.0).to(tl.float32)
    return weight, tl.where(is_known, value - pivot, 0.0)


@triton.jit
def _accumulate(
    values_ptr,
    known_ptr,
    weights_ptr,
    pivot_ptr,
    a,
    b,
    start,
    stop,
    num_columns,
    strides,
    IS_SECOND_ORDER: tl.constexpr,
    HAS_KNOWN: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    COUNT_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum two moments of the column pairs a x b over the rows [start, stop): n and sx, or sxx and sxy."""
    is_a, is_b = a < num_columns, b < num_columns
    pivot_a = tl.load(pivot_ptr + a, mask=is_a, other=0.0)
    pivot_b = tl.load(pivot_ptr + b, mask=is_b, other=0.0)
    one = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    other = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for row in range(start, stop, BLOCK_N):
        n = row + tl.arange(0, BLOCK_N)
        is_row = n < stop
        # The left factor is read as [A, N], so that nothing is transposed between load and product.
        weight_a, shifted_a = _read(
            values_ptr, known_ptr, weights_ptr, pivot_a[:, None], n[None, :], a[:, None],
            is_a[:, None] & is_row[None, :], strides, HAS_KNOWN, HAS_WEIGHTS,
        )  # fmt: skip
        weight_b, shifted_b = _read(
            values_ptr, known_ptr, weights_ptr, pivot_b[None, :], n[:, None], b[None, :],
            is_row[:, None] & is_b[None, :], strides, HAS_KNOWN, HAS_WEIGHTS,
        )  # fmt: skip
        first_a = weight_a * shifted_a
        if IS_SECOND_ORDER:
            one = tl.dot(first_a * shifted_a, weight_b, one, input_precision=PRECISION)
            other = tl.dot(first_a, weight_b * shifted_b, other, input_precision=PRECISION)
        else:
            one = tl.dot(weight_a, weight_b, one, input_precision=COUNT_PRECISION)
            other = tl.dot(first_a, weight_b, other, input_precision=PRECISION)
    return one, other


@triton.jit
def _moments_kernel(
    values_ptr,
    known_ptr,
    weights_ptr,
    pivot_ptr,
    partial_ptr,
    num_rows,
    num_columns,
    stride_vn,
    stride_vc,
    stride_kn,
    stride_kc,
    stride_wn,
    stride_wc,
    first_row,
    split_rows,
    HAS_KNOWN: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    COUNT_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write two moments of one tile of column pairs over one split of the rows to partial [splits, 4, C, C]."""
    strides = (stride_vn, stride_vc, stride_kn, stride_kc, stride_wn, stride_wc)
    tiles_b = tl.cdiv(num_columns, BLOCK_B)
    tile = tl.program_id(0) // 2
    # 64 bits: a row times its stride passes 2^31 elements, and so does a column of a transposed matrix.
    a = (tile // tiles_b).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    b = (tile % tiles_b).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    split = tl.program_id(1).to(tl.int64)
    start = first_row + split * split_rows
    stop = tl.minimum(start + split_rows, num_rows)
    is_second_order = tl.program_id(0) % 2
    moment = split * 4 + 2 * is_second_order
    one_ptr = partial_ptr + (moment * num_columns + a[:, None]) * num_columns + b[None, :]
    other_ptr = partial_ptr + ((moment + 1) * num_columns + a[:, None]) * num_columns + b[None, :]
    is_pair = (a < num_columns)[:, None] & (b < num_columns)[None, :]
    if is_second_order:
        second, cross = _accumulate(
            values_ptr, known_ptr, weights_ptr, pivot_ptr, a, b, start, stop, num_columns, strides, True,
            HAS_KNOWN, HAS_WEIGHTS, COUNT_PRECISION, PRECISION, BLOCK_A, BLOCK_B, BLOCK_N,
        )  # fmt: skip
        tl.store(one_ptr, second, mask=is_pair)
        tl.store(other_ptr, cross, mask=is_pair)
    else:
        count, first = _accumulate(
            values_ptr, known_ptr, weights_ptr, pivot_ptr, a, b, start, stop, num_columns, strides, False,
            HAS_KNOWN, HAS_WEIGHTS, COUNT_PRECISION, PRECISION, BLOCK_A, BLOCK_B, BLOCK_N,
        )  # fmt: skip
        tl.store(one_ptr, count, mask=is_pair)
        tl.store(other_ptr, first, mask=is_pair)


def moments(values: Tensor, known: Tensor | None, weights: Tensor | None, pivot: Tensor) -> Tensor:
    """Sum the four moments of every pair of columns.

    Args:
        values: [N, C] fp32, fp16 or bf16, any strides; what stands in unknown cells is never used.
        known: [N, C] bool, or None: every cell is known.
        weights: [N, C] floating-point cell weights, or None: 1. A cell of weight <= 0 is unknown.
        pivot: [C] fp32.

    Returns:
        [4, C, C] float64: n, sx, sxx, sxy. No gradient is recorded.

    Source: kernels.md section 2.

    """
    num_rows, num_columns = values.shape
    total = pivot.new_zeros(4, num_columns, num_columns, dtype=torch.float64)
    if total.numel() == 0 or num_rows == 0:
        return total
    tile = tiles.tile("pearson", values.device, values.dtype)
    split_rows = _split_rows(num_rows)
    num_splits = triton.cdiv(num_rows, split_rows)
    group = min(num_splits, max(1, _PARTIAL_BYTES // (16 * num_columns**2)))
    partial = pivot.new_empty(group, 4, num_columns, num_columns)
    num_tiles = triton.cdiv(num_columns, tile.rows) * triton.cdiv(num_columns, tile.columns)
    mask = None if known is None else known.view(torch.uint8)
    strides = [
        stride for tensor in (values, mask, weights) for stride in (tensor.stride() if tensor is not None else (0, 0))
    ]
    for first_split in range(0, num_splits, group):
        splits = min(group, num_splits - first_split)
        _moments_kernel[(2 * num_tiles, splits)](
            values, mask, weights, pivot, partial, num_rows, num_columns, *strides,
            first_split * split_rows, split_rows,
            **_constants(tile, _is_amd(), mask is not None, weights is not None), **_options(tile),
        )  # fmt: skip
        total += partial[:splits].sum(0, dtype=torch.float64)
    return total


def ahead_of_time(variant: str, tile: Tile, dtype: torch.dtype, *, is_amd: bool) -> tiles.Compilation:
    """Describe the kernel for compilation without a GPU: contiguous inputs whose rows are aligned, with a mask.

    Args:
        variant: "moments" (without weights) or "moments_weighted" (with fp32 ones).
        tile: sizes.
        dtype: of the values.
        is_amd: for AMD, where fp32 products have an instruction of their own.

    """
    has_weights = variant == "moments_weighted"
    constants: dict[str, Any] = _constants(tile, is_amd, has_known=True, has_weights=has_weights)
    constants |= {"stride_vc": 1, "stride_kc": 1, "stride_wc": 1}
    if not has_weights:
        constants["weights_ptr"] = None
    pointers = {"values_ptr": tiles.type_name(dtype), "known_ptr": "u8"}
    signature = {}
    for name in _moments_kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = "*" + pointers.get(name, "fp32") if name.endswith("_ptr") else "i32"
    aligned = {name for name in signature if name.endswith(("_ptr", "_vn", "_kn", "_wn", "split_rows", "num_columns"))}
    return tiles.Compilation(_moments_kernel, signature, constants, aligned - set(constants), tile)


def _split_rows(num_rows: int) -> int:
    """Rows of one program: enough programs to fill a GPU, and no more rows than one fp32 sum may take."""
    return min(BLOCK_ROWS, max(128, int(triton.next_power_of_2(triton.cdiv(num_rows, 128)))))


def _is_amd() -> bool:
    return torch.version.hip is not None


def _constants(tile: Tile, is_amd: bool, has_known: bool, has_weights: bool) -> dict[str, Any]:
    # AMD's matrix units take fp32 as it is. Weights of 0 and 1 are exact in tf32, so that counting needs one product.
    precision = "ieee" if is_amd or is_interpreting() else "tf32x3"
    return {
        "HAS_KNOWN": has_known,
        "HAS_WEIGHTS": has_weights,
        "COUNT_PRECISION": "tf32" if precision == "tf32x3" and not has_weights else precision,
        "PRECISION": precision,
        "BLOCK_A": tile.rows,
        "BLOCK_B": tile.columns,
        "BLOCK_N": tile.inner,
    }


def _options(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
