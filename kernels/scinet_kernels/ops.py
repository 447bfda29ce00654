"""Public Gaussian operators: check, promote to at least fp32, gather over ranks or send round, run.

Shapes: B queries, M keys (of all ranks where a group is given), D embedding, C classes, K neighbours.
"""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from scinet_kernels import checks, dispatch, reference, ring, sharded
from scinet_kernels import neighbours as neighbour_search
from scinet_kernels.gaussian import Arguments, gaussian, own_rows
from scinet_kernels.reference import DEFAULT_WORKSPACE_BYTES, Pairs
from scinet_kernels.ring import Ring
from scinet_kernels.tiling import Problem


class _Call(NamedTuple):
    """A checked call: its operands, gathered from all ranks unless they are to go round, and what to run them by."""

    arguments: Arguments
    neighbours: int | None
    wide: torch.dtype
    ring: Ring | None = None


def _promoted(*tensors: Tensor | None) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


def _full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Keep autocast from running the distance product in half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def _as_vector(bandwidth: float | Tensor, queries: Tensor) -> Tensor:
    """One bandwidth for all, [1], or one per query, [B], at least fp32, on the queries' device; keeps its gradient."""
    return torch.as_tensor(bandwidth, dtype=_promoted(queries), device=queries.device).reshape(-1)


def _prepare(
    operator: str,
    queries: Tensor,
    values: Tensor | None,
    *,
    bandwidth: float | Tensor,
    keys: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    exclude_self: bool,
    radius: float | None,
    neighbours: int | None,
    key_weights: Tensor | None,
    backend: str,
    precision: str,
    workspace_bytes: int,
    group: dist.ProcessGroup | None,
) -> _Call:
    checks.check_backend(backend)
    checks.check_precision(precision)
    num_keys = checks.check_keys(queries, keys)
    checks.check_bandwidth(bandwidth, queries)
    checks.check_pairs(queries, keys, query_ids, key_ids, key_weights, radius, neighbours)
    checks.check_at_least_one("workspace_bytes", workspace_bytes)
    if exclude_self and keys is not None:
        raise ValueError("exclude_self needs keys=None: with separate keys, exclude by query_ids and key_ids.")
    if values is not None:
        checks.check_matrix("values", values)
        checks.check_same_device("values", values, "queries", queries)
        if values.shape[0] != num_keys:
            raise ValueError(f"values have {values.shape[0]} rows but there are {num_keys} keys: one row for each.")
    arguments = Arguments(
        queries=queries,
        keys=None if keys is queries else keys,
        values=values,
        bandwidth=_as_vector(bandwidth, queries),
        key_weights=key_weights,
        query_ids=query_ids,
        key_ids=query_ids if keys is None else key_ids,
        self_offset=0 if keys is None else None,
        exclude_self=exclude_self,
        radius=radius,
        backend=backend,
        workspace_bytes=workspace_bytes,
        precision=precision,
    )
    return _resolve(operator, _Call(arguments, neighbours, _promoted(values)), group)


def _resolve(operator: str, call: _Call, group: dist.ProcessGroup | None) -> _Call:
    """Choose the implementation; with a group, gather the keys of all ranks or have them go round."""
    given = call.arguments
    keys = given.queries if given.keys is None else given.keys
    rows = keys, given.values, given.key_ids, given.key_weights
    counts, num_bytes = ([len(keys)], 0) if group is None else sharded.count_rows(rows, group)
    neighbours = None if call.neighbours is None or call.neighbours >= sum(counts) else call.neighbours
    probe = keys.new_empty(0, dtype=_promoted(given.queries, keys, given.values))
    fits_triton = neighbours is None
    chosen = dispatch.choose(operator, given.backend, probe, rows=len(given.queries), fits_triton=fits_triton)
    arguments, call = given._replace(backend=chosen), call._replace(neighbours=neighbours)
    if group is None:
        return call._replace(arguments=arguments)
    if dispatch.goes_round(operator, chosen, num_bytes, has_neighbours=neighbours is not None):
        arguments = arguments._replace(keys=keys if given.self_offset is None else None)
        return call._replace(arguments=arguments, ring=Ring(group, counts))
    (all_keys, values, key_ids, key_weights), start = sharded.gather_rows(rows, counts, group)
    offset = None if given.self_offset is None else start
    arguments = arguments._replace(
        keys=all_keys, values=values, key_ids=key_ids, key_weights=key_weights, self_offset=offset
    )
    return call._replace(arguments=arguments)


def _run(call: _Call) -> tuple[Tensor, Tensor]:
    """Return result [B, C] and log mass [B] by the operator."""
    return gaussian(call.arguments) if call.ring is None else ring.gaussian(call.arguments, call.ring)


def _run_reference(call: _Call) -> Tensor:
    """Return the result [B, C], or without values the log mass [B], by the definition."""
    problem = call.arguments.problem()
    queries, keys = problem.queries.to(problem.dtype), problem.keys.to(problem.dtype)
    bandwidth = problem.bandwidth.expand(len(queries))
    pairs = replace(problem.pairs, neighbours=call.neighbours)
    if problem.values is None:
        return reference.mass(queries, keys, bandwidth, pairs, problem.workspace_bytes)
    values = problem.values.to(call.wide)
    return reference.propagate(queries, keys, values, bandwidth, pairs, problem.workspace_bytes)


def gaussian_propagate(
    queries: Tensor,
    values: Tensor,
    *,
    bandwidth: float | Tensor,
    keys: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    exclude_self: bool = False,
    radius: float | None = None,
    neighbours: int | None = None,
    key_weights: Tensor | None = None,
    backend: str = "auto",
    precision: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Average the values of near keys with row-normalised Gaussian weights. Collective where `group` is given.

    `P_i = sum_j w_j S_ij c_j / sum_j w_j S_ij`, `S_ij = exp(-|x_i - y_j|^2 / (2 s_i^2))`.

    Args:
        queries: [B, D] floating point; fp16 and bf16 are accumulated in fp32. NaN and Inf propagate.
        values: [M, C] floating point, one row per key.
        bandwidth: s > 0, a float, or a floating-point tensor [] or [B] (whose values are not checked).
        keys: [M, D], or None: the queries themselves.
        query_ids: [B] int64; pairs of equal id do not count. Without keys they name the keys too.
        key_ids: [M] int64, with `query_ids` and keys.
        exclude_self: leave out i == j; needs `keys=None`.
        radius: only keys at a Euclidean distance <= radius count.
        neighbours: only so many nearest of the keys that count otherwise; among equals the lower index.
        key_weights: [M] floating point w; a key with w <= 0 does not count.
        backend: "auto", "triton", "cpu" (blocked PyTorch, on any device) or "reference".
        precision: of fp32 products in Triton: "auto" is tf32x3 on NVIDIA, "ieee" is slower and exact; no other path has
            a choice.
        workspace_bytes: bound on temporaries of size M per query, met by working on a few queries at a time (one at
            least) and by computing them again in the backward.
        group: process group; keys (without keys: queries), values, ids and weights are then this rank's rows, and the
            keys of all ranks count, uneven and zero row counts included. They are gathered on every rank; beyond
            1 GiB of all ranks' rows they go round the ranks instead, one shard at a time, but never with
            `neighbours` or the reference. The gradient is that of the sum of all ranks' losses; what requires a
            gradient must do so on every rank.

    Returns:
        [B, C] in the dtype of the values promoted to at least fp32, differentiable in queries, keys, values,
        bandwidth and positive weights. A query without any neighbour gets a zero row with zero gradient;
        `gaussian_mass` (-inf) says which.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, device, range or name does not fit.

    Source: method.md section 3, kernels.md sections 2 and 5.5.

    """
    call = _prepare(
        "gaussian_propagate",
        queries,
        values,
        bandwidth=bandwidth,
        keys=keys,
        query_ids=query_ids,
        key_ids=key_ids,
        exclude_self=exclude_self,
        radius=radius,
        neighbours=neighbours,
        key_weights=key_weights,
        backend=backend,
        precision=precision,
        workspace_bytes=workspace_bytes,
        group=group,
    )
    with _full_precision(queries):
        if call.arguments.backend == "reference":
            return _run_reference(call)
        if call.neighbours is not None:
            return neighbour_search.propagate(call.arguments.problem(), call.neighbours)
        return _run(call)[0].to(call.wide)


def gaussian_mass(
    queries: Tensor,
    *,
    bandwidth: float | Tensor,
    keys: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    exclude_self: bool = False,
    radius: float | None = None,
    neighbours: int | None = None,
    key_weights: Tensor | None = None,
    backend: str = "auto",
    precision: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Logarithm of each query's sum of weights, log sum_j w_j S_ij. Collective where `group` is given.

    Args:
        queries: [B, D] floating point.
        bandwidth: as in `gaussian_propagate`.
        keys: [M, D], or None: the queries themselves.
        query_ids: as in `gaussian_propagate`.
        key_ids: as in `gaussian_propagate`.
        exclude_self: as in `gaussian_propagate`.
        radius: as in `gaussian_propagate`.
        neighbours: as in `gaussian_propagate`.
        key_weights: as in `gaussian_propagate`.
        backend: "auto", "triton", "cpu" (blocked PyTorch, on any device) or "reference".
        precision: as in `gaussian_propagate`.
        workspace_bytes: as in `gaussian_propagate`.
        group: as in `gaussian_propagate`.

    Returns:
        [B] at least fp32; -inf for a query without any neighbour.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, device, range or name does not fit.

    Source: kernels.md section 5.1.

    """
    call = _prepare(
        "gaussian_mass",
        queries,
        None,
        bandwidth=bandwidth,
        keys=keys,
        query_ids=query_ids,
        key_ids=key_ids,
        exclude_self=exclude_self,
        radius=radius,
        neighbours=neighbours,
        key_weights=key_weights,
        backend=backend,
        precision=precision,
        workspace_bytes=workspace_bytes,
        group=group,
    )
    with _full_precision(queries):
        if call.arguments.backend == "reference":
            return _run_reference(call)
        if call.neighbours is not None:
            return neighbour_search.mass(call.arguments.problem(), call.neighbours)
        return _run(call)[1]


def gaussian_similarity(queries: Tensor, keys: Tensor, *, bandwidth: float | Tensor) -> Tensor:
    """Return the Gaussian weights themselves, all B x M of them: for small sizes and plots.

    Args:
        queries: [B, D] floating point.
        keys: [M, D] floating point.
        bandwidth: as in `gaussian_propagate`.

    Returns:
        [B, M] in [0, 1], at least fp32, not normalised.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, device or range does not fit.

    Source: method.md section 3.

    """
    checks.check_keys(queries, keys)
    checks.check_bandwidth(bandwidth, queries)
    dtype = _promoted(queries, keys)
    queries, keys = reference.centred(queries.to(dtype), keys.to(dtype))
    bandwidths = _as_vector(bandwidth, queries).expand(len(queries))
    with _full_precision(queries):
        return reference.log_weights(queries, keys, bandwidths, Pairs()).exp()


def nearest_neighbours(
    queries: Tensor,
    k: int,
    *,
    keys: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    exclude_self: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Find the k nearest keys of each query, nearest first; among equals the lower index.

    Args:
        queries: [B, D] floating point.
        k: number of keys wanted, >= 1.
        keys: [M, D], or None: the queries themselves.
        query_ids: [B] int64; pairs of equal id do not count. Without keys they name the keys too.
        key_ids: [M] int64, with `query_ids` and keys.
        exclude_self: leave out i == j; has a meaning only without keys.
        backend: "auto", "triton", "cpu" (blocked PyTorch, on any device) or "reference".

    Returns:
        (index [B, k] int64, squared distance [B, k] fp32, differentiable with the choice held fixed); index -1 and
        distance inf where fewer than k keys are allowed.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, device, range or name does not fit.

    Source: method.md section 3 (adaptive bandwidth), kernels.md section 5.1.

    """
    checks.check_backend(backend)
    checks.check_at_least_one("k", k)
    checks.check_keys(queries, keys)
    checks.check_pairs(queries, keys, query_ids, key_ids, None, None, None)
    all_keys = queries if keys is None else keys
    self_offset = 0 if keys is None else None
    key_ids = query_ids if keys is None else key_ids
    pairs = Pairs(own_rows(queries, self_offset), exclude_self, query_ids, key_ids)
    problem = Problem(queries, all_keys, None, queries.new_ones(1), pairs, self_offset, DEFAULT_WORKSPACE_BYTES)
    probe = queries.new_empty(0, dtype=problem.dtype)
    chosen = dispatch.choose("nearest_neighbours", backend, probe, rows=len(queries), fits_triton=False)
    with _full_precision(queries):
        if chosen == "reference":
            operands = queries.to(problem.dtype), all_keys.to(problem.dtype), k, pairs, DEFAULT_WORKSPACE_BYTES
            index, squared = reference.nearest(*operands)
        else:
            index, squared = neighbour_search.nearest(problem, k)
    return index, squared.float()


def median_bandwidth(queries: Tensor, *, sample: int = 4096, generator: torch.Generator | None = None) -> Tensor:
    """Measure the median distance between two rows, a usual first guess of the bandwidth.

    Args:
        queries: [B, D] floating point, B >= 2.
        sample: largest number of rows looked at, >= 2; all pairs among them are measured.
        generator: draws the rows where there are more than `sample`; None takes them evenly spaced.

    Returns:
        [] at least fp32, > 0: machine epsilon where more than half the distances are 0.

    Raises:
        TypeError: queries are not floating point.
        ValueError: fewer than two rows, or `sample` < 2.

    Source: kernels.md section 5.1.

    """
    checks.check_matrix("queries", queries)
    num_rows = queries.shape[0]
    if min(num_rows, sample) < 2:
        raise ValueError(f"median_bandwidth needs at least 2 rows and sample >= 2, got {num_rows} and {sample}.")
    rows = queries.to(_promoted(queries))
    if num_rows > sample and generator is None:
        rows = rows[torch.arange(sample, device=rows.device) * num_rows // sample]
    elif num_rows > sample:
        assert generator is not None
        chosen = torch.randperm(num_rows, generator=generator, device=generator.device)[:sample]
        rows = rows[chosen.to(rows.device)]
    return torch.pdist(rows).median().clamp_min(torch.finfo(rows.dtype).eps)
