"""Rows spread over ranks: count, gather and sum, with gradients.

All follow one convention: the backward yields the gradient of the *sum of all ranks' losses*, so every rank must run
it, and a tensor must require gradients on all ranks or on none.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def _all_gather(tensor: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Join the rows of all ranks, padded to the longest on the way."""
    longest = max(counts)
    if longest == 0:
        return tensor.clone()
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _GatherRows(torch.autograd.Function):
    """One node for all tensors, so that the collectives of the backward come in one order on every rank."""

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, counts: Sequence[int], start: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.start = group, start
        ctx.rows = counts[dist.get_rank(group)]
        gathered = tuple(_all_gather(tensor, counts, group) for tensor in tensors)
        ctx.mark_non_differentiable(*(tensor for tensor in gathered if not tensor.is_floating_point()))
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        own: list[Tensor | None] = []
        for gradient, is_needed in zip(gradients, ctx.needs_input_grad[3:], strict=True):
            if not is_needed:
                own.append(None)
                continue
            total = gradient.contiguous().clone()
            if total.numel() > 0:
                dist.all_reduce(total, group=ctx.group)
            own.append(total[ctx.start : ctx.start + ctx.rows])
        return None, None, None, *own


class Spread(NamedTuple):
    """How rows are spread over the ranks; the same on each.

    Attributes:
        counts: [W] rows of each rank.
        num_bytes: bytes of all ranks' rows.

    """

    counts: list[int]
    num_bytes: int


def count_rows(tensors: Sequence[Tensor | None], group: dist.ProcessGroup) -> Spread:
    """Exchange how many rows each rank has; counts may differ, also be 0. Collective.

    Args:
        tensors: [m, ...] each with the same number m of rows on this rank; None must be None on all ranks.
        group: process group. The host waits once for the counts.

    Raises:
        ValueError: the ranks disagree on the number of columns (raised on every rank).

    """
    present = [tensor for tensor in tensors if tensor is not None]
    widths = [tensor.shape[1] for tensor in present if tensor.dim() == 2]
    row_bytes = sum(math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in present)
    mine = torch.tensor([present[0].shape[0], row_bytes, *widths], dtype=torch.int64, device=present[0].device)
    sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, mine, group=group)
    table = torch.stack(sizes).tolist()
    if any(row[2:] != widths for row in table):
        raise ValueError(f"ranks disagree on the number of columns: {[row[2:] for row in table]}.")
    return Spread([row[0] for row in table], sum(row[0] * row[1] for row in table))


def gather_rows(
    tensors: Sequence[Tensor | None], counts: Sequence[int], group: dist.ProcessGroup
) -> tuple[list[Tensor | None], int]:
    """Gather each tensor's rows from all ranks, in rank order. Collective.

    Args:
        tensors: as given to :func:`count_rows`.
        counts: [W] rows of each rank.
        group: process group.

    Returns:
        (the tensors [M, ...] with the rows of all ranks, the position of this rank's first row).

    """
    start = sum(counts[: dist.get_rank(group)])
    gathered = iter(_GatherRows.apply(group, counts, start, *[tensor for tensor in tensors if tensor is not None]))
    return [None if tensor is None else next(gathered) for tensor in tensors], start


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, tensor: Tensor) -> Tensor:
        ctx.group = group
        total = tensor.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return None, total


def sum_over_ranks(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum a tensor over the ranks. Collective.

    Args:
        tensor: any shape, equal on all ranks.
        group: process group.

    Returns:
        The sum, a new tensor, the same on every rank.

    """
    total: Tensor = _SumOverRanks.apply(group, tensor)
    return total
