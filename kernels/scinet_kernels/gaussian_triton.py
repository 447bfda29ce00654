"""Triton kernels of the Gaussian operator and what launches them; imported on dispatch only.

Shapes: B queries, M keys, D embedding, C value columns. Forward: one program holds BLOCK_B query rows and BLOCK_C value
columns, streams over the keys and keeps a running maximum. Backward: one program writes a tile of `T` (what each
exponent is worth) and of the normalised weights into a panel of rows, and library products do the rest: accumulators as
wide as D do not fit the registers (kernels.md section 3). No atomics; order and results are fixed by the tiles.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from scinet_kernels import tiles
from scinet_kernels.reference import centre_of
from scinet_kernels.tiles import Tile
from scinet_kernels.tiling import Problem

_LOG2_E = 1.4426950408889634
_LN_2 = 0.6931471805599453


@triton.jit
def _exponents(
    held, x_ptr, y_ptr, x_norm, y_norm, rate, log_w_ptr, query_id, key_id_ptr,
    row, column, is_row, is_column, D, stride_xb, stride_xd, stride_ym, stride_yd, radius_squared, self_offset,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_SELF: tl.constexpr, EXCLUDES_SELF: tl.constexpr, HAS_IDS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_RADIUS: tl.constexpr, HOLDS_QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Exponents to base 2 of a tile, -inf where a pair does not count; `held` are whole query rows, or not read."""
    product = tl.zeros((BLOCK_B, BLOCK_M), dtype=tl.float32)
    x_row = x_ptr + row.to(tl.int64)[:, None] * stride_xb
    y_row = y_ptr + column.to(tl.int64)[None, :] * stride_ym
    for start in range(0, BLOCK_D if HOLDS_QUERIES else D, BLOCK_D):
        inner = start + tl.arange(0, BLOCK_D)
        if HOLDS_QUERIES:
            x = held
        else:
            x = tl.load(x_row + inner[None, :] * stride_xd, mask=is_row[:, None] & (inner < D)[None, :], other=0.0)
        y = tl.load(y_row + inner[:, None] * stride_yd, mask=is_column[None, :] & (inner < D)[:, None], other=0.0)
        product = tl.dot(x, y, product, input_precision=PRECISION)
    squared = tl.maximum(x_norm[:, None] + y_norm[None, :] - 2 * product, 0.0, propagate_nan=tl.PropagateNan.ALL)
    own = (row + self_offset)[:, None] == column[None, :]
    if HAS_SELF:  # the expansion leaves rounding noise where the distance is 0
        squared = tl.where(own, 0.0, squared)
    exponent = squared * rate[:, None]
    if HAS_WEIGHTS:
        exponent += tl.load(log_w_ptr + column, mask=is_column, other=0.0)[None, :]
    counts = is_column[None, :]
    if EXCLUDES_SELF:
        counts = counts & (own == 0)
    if HAS_IDS:
        key_id = tl.load(key_id_ptr + column, mask=is_column, other=0)
        counts = counts & (query_id[:, None] != key_id[None, :])
    if HAS_RADIUS:
        counts = counts & (squared <= radius_squared)
    return tl.where(counts, exponent, float("-inf")), own


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr, c_ptr, x_norm_ptr, y_norm_ptr, rate_ptr, log_w_ptr, query_id_ptr, key_id_ptr, out_ptr, log_mass_ptr,
    B, M, D, C, stride_xb, stride_xd, stride_ym, stride_yd, stride_cm, stride_cc, stride_ob, stride_oc,
    radius_squared, self_offset,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_SELF: tl.constexpr, EXCLUDES_SELF: tl.constexpr, HAS_IDS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_RADIUS: tl.constexpr, IS_BOUNDED: tl.constexpr, HOLDS_QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Propagate a block of query rows; the first block of value columns also writes the mass.

    Where BLOCK_D takes a whole row, HOLDS_QUERIES keeps the query rows in shared memory instead of reading them again
    for every block of keys, which is the larger part of the traffic.
    """
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    value = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_row, is_value = row < B, value < C
    x_norm = tl.load(x_norm_ptr + row, mask=is_row, other=0.0)
    rate = tl.load(rate_ptr + row, mask=is_row, other=0.0)
    query_id = row.to(tl.int64)
    if HAS_IDS:
        query_id = tl.load(query_id_ptr + row, mask=is_row, other=0)
    held = x_norm
    if HOLDS_QUERIES:
        inner = tl.arange(0, BLOCK_D)
        held = tl.load(
            x_ptr + row.to(tl.int64)[:, None] * stride_xb + inner[None, :] * stride_xd,
            mask=is_row[:, None] & (inner < D)[None, :],
            other=0.0,
        )
    largest = tl.full((BLOCK_B,), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((BLOCK_B,), dtype=tl.float32)
    total = tl.zeros((BLOCK_B, BLOCK_C), dtype=tl.float32)
    for start in range(0, M, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        is_column = column < M
        y_norm = tl.load(y_norm_ptr + column, mask=is_column, other=0.0)
        exponent, _ = _exponents(
            held, x_ptr, y_ptr, x_norm, y_norm, rate, log_w_ptr, query_id, key_id_ptr,
            row, column, is_row, is_column, D, stride_xb, stride_xd, stride_ym, stride_yd, radius_squared, self_offset,
            BLOCK_B, BLOCK_M, BLOCK_D, HAS_SELF, EXCLUDES_SELF, HAS_IDS, HAS_WEIGHTS, HAS_RADIUS,
            HOLDS_QUERIES, PRECISION,
        )  # fmt: skip
        c = tl.load(
            c_ptr + column.to(tl.int64)[:, None] * stride_cm + value[None, :] * stride_cc,
            mask=is_column[:, None] & is_value[None, :],
            other=0.0,
        )
        if IS_BOUNDED:  # every row holds itself at weight 1, so that no sum can underflow
            weight = tl.exp2(exponent)
        else:
            larger = tl.maximum(largest, tl.max(exponent, 1), propagate_nan=tl.PropagateNan.ALL)
            shift = tl.where(larger == float("-inf"), 0.0, larger)
            weight = tl.exp2(exponent - shift[:, None])
            rescale = tl.exp2(largest - shift)
            largest = larger
            mass *= rescale
            total *= rescale[:, None]
        mass += tl.sum(weight, 1)
        total = tl.dot(weight.to(c.dtype), c, total, input_precision=PRECISION)
    is_empty = mass == 0.0
    result = total / tl.where(is_empty, 1.0, mass)[:, None]
    tl.store(
        out_ptr + row.to(tl.int64)[:, None] * stride_ob + value[None, :] * stride_oc,
        result,
        mask=is_row[:, None] & is_value[None, :],
    )
    if tl.program_id(1) == 0:
        log_mass = tl.log2(tl.where(is_empty, 1.0, mass))
        if not IS_BOUNDED:
            log_mass += tl.where(is_empty, 0.0, largest)
        log_mass = tl.where(is_empty, float("-inf"), log_mass)
        tl.store(log_mass_ptr + row, log_mass, mask=is_row)


@triton.jit
def _panel_kernel(
    x_ptr, y_ptr, c_ptr, g_ptr, x_norm_ptr, y_norm_ptr, rate_ptr, log_w_ptr, query_id_ptr, key_id_ptr,
    log_mass_ptr, offset_ptr, worth_ptr, weight_ptr,
    B, M, D, C, stride_xb, stride_xd, stride_ym, stride_yd, stride_cm, stride_cc, stride_gb, stride_gc, stride_pb,
    radius_squared, self_offset,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_SELF: tl.constexpr, EXCLUDES_SELF: tl.constexpr, HAS_IDS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_RADIUS: tl.constexpr, STORES_WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write `T_ij = P_ij (<G_i, c_j> - offset_i)`, zero where a row meets itself, and P_ij."""
    column = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    is_row, is_column = row < B, column < M
    x_norm = tl.load(x_norm_ptr + row, mask=is_row, other=0.0)
    y_norm = tl.load(y_norm_ptr + column, mask=is_column, other=0.0)
    rate = tl.load(rate_ptr + row, mask=is_row, other=0.0)
    query_id = row.to(tl.int64)
    if HAS_IDS:
        query_id = tl.load(query_id_ptr + row, mask=is_row, other=0)
    exponent, own = _exponents(
        x_norm, x_ptr, y_ptr, x_norm, y_norm, rate, log_w_ptr, query_id, key_id_ptr,
        row, column, is_row, is_column, D, stride_xb, stride_xd, stride_ym, stride_yd, radius_squared, self_offset,
        BLOCK_B, BLOCK_M, BLOCK_D, HAS_SELF, EXCLUDES_SELF, HAS_IDS, HAS_WEIGHTS, HAS_RADIUS,
        False, PRECISION,
    )  # fmt: skip
    log_mass = tl.load(log_mass_ptr + row, mask=is_row, other=0.0)
    weight = tl.exp2(exponent - tl.where(log_mass == float("-inf"), 0.0, log_mass)[:, None])
    worth = tl.zeros((BLOCK_B, BLOCK_M), dtype=tl.float32) - tl.load(offset_ptr + row, mask=is_row, other=0.0)[:, None]
    for start in range(0, C, BLOCK_C):
        value = start + tl.arange(0, BLOCK_C)
        g = tl.load(
            g_ptr + row.to(tl.int64)[:, None] * stride_gb + value[None, :] * stride_gc,
            mask=is_row[:, None] & (value < C)[None, :],
            other=0.0,
        )
        c = tl.load(
            c_ptr + column.to(tl.int64)[None, :] * stride_cm + value[:, None] * stride_cc,
            mask=is_column[None, :] & (value < C)[:, None],
            other=0.0,
        )
        worth = tl.dot(g, c, worth, input_precision=PRECISION)
    worth = weight * worth
    if HAS_SELF:  # a row does not pull at itself, and its large weight would leave rounding noise
        worth = tl.where(own, 0.0, worth)
    place = row.to(tl.int64)[:, None] * stride_pb + column[None, :]
    is_cell = is_row[:, None] & is_column[None, :]
    tl.store(worth_ptr + place, worth, mask=is_cell)
    if STORES_WEIGHT:
        tl.store(weight_ptr + place, weight, mask=is_cell)


class Operands(NamedTuple):
    """What both kernels read: rows in one dtype, fp32 vectors; bandwidth and weights on the scale of base 2."""

    queries: Tensor
    keys: Tensor
    query_norms: Tensor
    key_norms: Tensor
    rate: Tensor
    log_weights: Tensor | None


def prepare(problem: Problem) -> Operands:
    """Prepare the rows.

    Half-precision rows are taken as they are: their products and norms are exact in fp32. fp32 rows are centred, which
    costs a copy and saves the distances from cancellation (kernels.md 5.4).
    """
    queries, keys = problem.queries, problem.keys
    if queries.dtype != keys.dtype or queries.dtype == torch.float32:
        centre = centre_of(keys, torch.float32)
        keys = keys - centre
        queries = keys if problem.queries is problem.keys else queries - centre
    key_norms = _squared_norms(keys)
    query_norms = key_norms if queries is keys else _squared_norms(queries)
    rate = (-0.5 * _LOG2_E * problem.bandwidth.float().reciprocal().square()).clamp_min(-3e38)
    weights = problem.pairs.key_weights
    log_weights = None if weights is None else torch.where(weights > 0, weights, 0).float().log2()
    return Operands(queries, keys, query_norms, key_norms, rate.expand(len(queries)).contiguous(), log_weights)


def _squared_norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    return norms.square()


def input_precision(device: torch.device, precision: str) -> str:
    """Return how fp32 products are made; plain tf32 never: it would cost three digits without a word.

    Args:
        device: where the kernel runs.
        precision: "auto" or "ieee".

    """
    return "ieee" if precision == "ieee" or device.type != "cuda" or torch.version.hip else "tf32x3"


def _shared_arguments(problem: Problem, operands: Operands, rows: slice) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments that both kernels take, for some query rows: values, and compile-time flags."""
    pairs = problem.pairs
    queries = operands.queries[rows]
    nothing = operands.rate  # stands for pointers that the flags say are not read
    arguments = {
        "x_ptr": queries,
        "y_ptr": operands.keys,
        "x_norm_ptr": operands.query_norms[rows],
        "y_norm_ptr": operands.key_norms,
        "rate_ptr": operands.rate[rows],
        "log_w_ptr": nothing if operands.log_weights is None else operands.log_weights,
        "query_id_ptr": nothing if pairs.query_ids is None else pairs.query_ids[rows].contiguous(),
        "key_id_ptr": nothing if pairs.key_ids is None else pairs.key_ids.contiguous(),
        "B": len(queries),
        "M": len(operands.keys),
        "D": queries.shape[1],
        "stride_xb": queries.stride(0),
        "stride_xd": queries.stride(1),
        "stride_ym": operands.keys.stride(0),
        "stride_yd": operands.keys.stride(1),
        "radius_squared": 0.0 if pairs.radius is None else pairs.radius**2,
        "self_offset": 0 if problem.self_offset is None else problem.self_offset + rows.start,
    }
    flags = {
        "HAS_SELF": problem.self_offset is not None,
        "EXCLUDES_SELF": pairs.exclude_self,
        "HAS_IDS": pairs.query_ids is not None,
        "HAS_WEIGHTS": operands.log_weights is not None,
        "HAS_RADIUS": pairs.radius is not None,
        "PRECISION": input_precision(queries.device, problem.precision),
    }
    return arguments, flags


def _blocks(tile: Tile) -> dict[str, int]:
    return {"BLOCK_B": tile.rows, "BLOCK_M": tile.columns, "BLOCK_D": tile.inner, "BLOCK_C": tile.values}


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Propagate, and sum the weights.

    Args:
        problem: the operands; not float64.

    Returns:
        (result [B, C] fp32, log mass [B] fp32, log mass to base 2 [B], for the backward).

    """
    operands = prepare(problem)
    num_rows = len(operands.queries)
    values = operands.keys.new_zeros(len(operands.keys), 0) if problem.values is None else problem.values
    result = torch.empty(num_rows, values.shape[1], dtype=torch.float32, device=values.device)
    log_mass = torch.empty(num_rows, dtype=torch.float32, device=values.device)
    if num_rows:
        pairs = problem.pairs
        has_own = problem.self_offset is not None and not pairs.exclude_self and pairs.query_ids is None
        arguments, flags = _shared_arguments(problem, operands, slice(0, num_rows))
        flags["IS_BOUNDED"] = has_own and operands.log_weights is None
        kernel = tiles.forward_kernel(values.device, operands.queries.dtype, operands.queries.shape[1])
        flags["HOLDS_QUERIES"] = kernel == "gaussian_forward_held"
        tile = tiles.tile(kernel, values.device, operands.queries.dtype)
        grid = (triton.cdiv(num_rows, tile.rows), max(1, triton.cdiv(values.shape[1], tile.values)))
        _forward_kernel[grid](
            **arguments, **flags, **_blocks(tile), c_ptr=values, out_ptr=result, log_mass_ptr=log_mass,
            C=values.shape[1], stride_cm=values.stride(0), stride_cc=values.stride(1),
            stride_ob=result.stride(0), stride_oc=result.stride(1),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return result, log_mass * _LN_2, log_mass


def mass_of(problem: Problem, log_mass: Tensor) -> Tensor:
    """Return what :func:`forward` would give last, had it found this log mass.

    Args:
        problem: the operands; where keys go round the ranks, one shard of them.
        log_mass: [B], where keys go round that over all shards.

    """
    return log_mass.float() / _LN_2


def write_panel(
    problem: Problem, operands: Operands, rows: slice, values: Tensor, signal: Tensor, offset: Tensor,
    log_mass: Tensor, worth: Tensor, weights: Tensor | None,
) -> None:  # fmt: skip
    """Write a panel of the backward.

    Args:
        problem: the operands of the forward.
        operands: as of :func:`prepare`.
        rows: query rows of the panel, b of them.
        values: [M, C] of one dtype with `signal`.
        signal: [b, C] gradient of the result.
        offset: [b] fp32, subtracted from `<signal, value>`.
        log_mass: [b] fp32, to base 2.
        worth: [b, M] takes `T_ij = P_ij (<signal_i, value_j> - offset_i)`, 0 where a row meets itself.
        weights: [b, M] takes P_ij, or None.

    """
    arguments, flags = _shared_arguments(problem, operands, rows)
    tile = tiles.tile("gaussian_panel", worth.device, operands.queries.dtype)
    grid = (triton.cdiv(worth.shape[1], tile.columns), triton.cdiv(worth.shape[0], tile.rows))
    _panel_kernel[grid](
        **arguments, **flags, **_blocks(tile), STORES_WEIGHT=weights is not None,
        c_ptr=values, g_ptr=signal, offset_ptr=offset, log_mass_ptr=log_mass, worth_ptr=worth,
        weight_ptr=worth if weights is None else weights, C=values.shape[1],
        stride_cm=values.stride(0), stride_cc=values.stride(1), stride_gb=signal.stride(0), stride_gc=signal.stride(1),
        stride_pb=worth.stride(0), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


_POINTERS = {"query_id_ptr": "i64", "key_id_ptr": "i64"}
_ROW_DTYPE = ("x_ptr", "y_ptr", "c_ptr", "g_ptr")
_UNIT_STRIDES = ("stride_xd", "stride_yd", "stride_cc", "stride_gc", "stride_oc")


def ahead_of_time(variant: str, tile: Tile, dtype: torch.dtype, *, is_amd: bool) -> tiles.Compilation:
    """Describe a kernel for compilation without a GPU, with the flags and alignments of the training step.

    Args:
        variant: "forward" (separate keys, ids), "forward_bounded" (the queries are the keys), "panel" or
            "panel_with_weights" (for the gradient of the values too); "held" stands before the name of a forward that
            keeps its query rows.
        tile: sizes.
        dtype: of rows and values.
        is_amd: for AMD, where fp32 products have an instruction of their own.

    """
    kernel = _panel_kernel if variant.startswith("panel") else _forward_kernel
    is_self, holds_queries = variant.endswith("bounded"), variant.startswith("held")
    constants: dict[str, Any] = dict.fromkeys(_UNIT_STRIDES, 1) | _blocks(tile)
    constants |= {"HAS_SELF": is_self, "EXCLUDES_SELF": False, "HAS_IDS": not is_self, "HAS_WEIGHTS": False}
    constants |= {"HAS_RADIUS": False, "PRECISION": "ieee" if is_amd else "tf32x3"}
    constants |= {"HOLDS_QUERIES": holds_queries, "IS_BOUNDED": is_self}
    constants["STORES_WEIGHT"] = variant == "panel_with_weights"
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + _POINTERS.get(name, tiles.type_name(dtype) if name in _ROW_DTYPE else "fp32")
        else:
            signature[name] = "fp32" if name == "radius_squared" else "i32"
    if dtype != torch.float32 and variant.startswith("panel"):
        signature["worth_ptr"] = signature["weight_ptr"] = "*" + tiles.type_name(dtype)
    aligned = {name for name in signature if name.endswith("_ptr") or name.startswith("stride") or name == "D"}
    constants = {name: value for name, value in constants.items() if name in signature}
    return tiles.Compilation(kernel, signature, constants, aligned - set(constants), tile)
