"""The Gaussian operator as torch sees it: one custom operator with its gradient, whichever implementation runs.

A custom operator rather than a plain autograd function, so that `torch.compile` keeps its graph and
`torch.library.opcheck` can test it. Shapes: B queries, M keys (of all ranks), D embedding, C classes.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scinet_kernels import blocked, blocked_backward
from scinet_kernels.blocked_backward import Needs
from scinet_kernels.reference import Pairs
from scinet_kernels.tiling import Problem

_ARGUMENTS = (
    "Tensor queries, Tensor? keys, Tensor? values, Tensor bandwidth, Tensor? key_weights, Tensor? query_ids, "
    "Tensor? key_ids, int? self_offset, bool exclude_self, float? radius, str backend, int workspace_bytes, "
    "str precision"
)


class Arguments(NamedTuple):
    """What the operator takes, in the order of its schema.

    Attributes:
        queries: [B, D] floating point.
        keys: [M, D], or None: the queries themselves.
        values: [M, C], or None: only the mass is wanted.
        bandwidth: [1] or [B].
        key_weights: [M] or None.
        query_ids: [B] int64 or None.
        key_ids: [M] int64 or None.
        self_offset: the key row that is query row 0 itself, where the keys contain the queries.
        exclude_self: leave the own row out.
        radius: largest distance that counts, or None.
        backend: "cpu" or "triton".
        workspace_bytes: bound on temporaries.
        precision: "auto" or "ieee", of fp32 products on a GPU.

    """

    queries: Tensor
    keys: Tensor | None
    values: Tensor | None
    bandwidth: Tensor
    key_weights: Tensor | None
    query_ids: Tensor | None
    key_ids: Tensor | None
    self_offset: int | None
    exclude_self: bool
    radius: float | None
    backend: str
    workspace_bytes: int
    precision: str

    def problem(self) -> Problem:
        """Return the operands as the implementations take them."""
        pairs = Pairs(
            own=own_rows(self.queries, self.self_offset),
            exclude_self=self.exclude_self,
            query_ids=self.query_ids,
            key_ids=self.key_ids,
            radius=self.radius,
            key_weights=self.key_weights,
        )
        keys = self.queries if self.keys is None else self.keys
        operands = self.queries, keys, self.values, self.bandwidth
        return Problem(*operands, pairs, self.self_offset, self.workspace_bytes, precision=self.precision)


def own_rows(queries: Tensor, self_offset: int | None) -> Tensor | None:
    """Return the key row [B] that each query is, or None where the keys do not contain the queries."""
    if self_offset is None:
        return None
    return torch.arange(self_offset, self_offset + len(queries), device=queries.device)


def implementations(backend: str) -> tuple[ModuleType, ModuleType]:
    """Return the modules that hold ``forward`` and ``backward``; Triton is imported here and nowhere earlier.

    Args:
        backend: "cpu" or "triton".

    """
    if backend == "triton":
        from scinet_kernels import gaussian_panels, gaussian_triton

        return gaussian_triton, gaussian_panels
    return blocked, blocked_backward


def _forward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    arguments = Arguments(*given)
    with torch.autocast(arguments.queries.device.type, enabled=False):
        result: tuple[Tensor, Tensor, Tensor] = implementations(arguments.backend)[0].forward(arguments.problem())
    return result


def _backward(*given: Any) -> list[Tensor]:
    *operands, result, mass, grad_result, grad_log_mass, needs = given
    arguments = Arguments(*operands)
    with torch.autocast(arguments.queries.device.type, enabled=False):
        gradients = implementations(arguments.backend)[1].backward(
            arguments.problem(), result, mass, grad_result, grad_log_mass, Needs(*needs)
        )
    # an operator cannot return None: what is not wanted is empty
    return [
        part if need and part is not None else arguments.queries.new_empty(0)
        for need, part in zip(needs, gradients, strict=True)
    ]


# Defined piece by piece: `torch.library.custom_op` would import torch._dynamo at the first call, for seconds, and
# imported while a process group lives, torch._dynamo keeps that group alive.
torch.library.define("scinet::gaussian", f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "scinet::gaussian_backward",
    f"({_ARGUMENTS}, Tensor result, Tensor mass, Tensor grad_result, Tensor grad_log_mass, bool[] needs) -> Tensor[]",
)
torch.library.impl("scinet::gaussian", "CompositeExplicitAutograd", _forward)
torch.library.impl("scinet::gaussian_backward", "CompositeExplicitAutograd", _backward)


def _fake_forward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    arguments = Arguments(*given)
    queries, values = arguments.queries, arguments.values
    dtype = arguments.problem().dtype
    wide = dtype if values is None else torch.promote_types(values.dtype, dtype)
    rows, columns = queries.shape[0], 0 if values is None else values.shape[1]
    return (
        queries.new_empty(rows, columns, dtype=wide),
        queries.new_empty(rows, dtype=dtype),
        queries.new_empty(rows, dtype=wide),
    )


def _fake_backward(*given: Any) -> list[Tensor]:
    *operands, _, _, _, _, needs = given
    arguments = Arguments(*operands)
    narrow = arguments.problem().dtype
    wide = narrow if arguments.values is None else torch.promote_types(arguments.values.dtype, narrow)
    dtypes = narrow, narrow, wide, narrow, wide
    return [
        operand.new_empty(operand.shape, dtype=dtype)
        if need and operand is not None
        else arguments.queries.new_empty(0)
        for need, operand, dtype in zip(needs, arguments[:5], dtypes, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    arguments = Arguments(*inputs)
    ctx.save_for_backward(*arguments[:7], output[0], output[2])
    ctx.options = arguments[7:]


def _differentiate(ctx: Any, grad_result: Tensor, grad_log_mass: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *operands, result, mass = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    found = torch.ops.scinet.gaussian_backward(*operands, *ctx.options, result, mass, grad_result, grad_log_mass, needs)
    gradients = [
        part.to(operand.dtype) if need else None for need, part, operand in zip(needs, found, operands[:5], strict=True)
    ]
    return (*gradients, *[None] * (len(Arguments._fields) - 5))


torch.library.register_fake("scinet::gaussian", _fake_forward)
torch.library.register_fake("scinet::gaussian_backward", _fake_backward)
torch.library.register_autograd("scinet::gaussian", _differentiate, setup_context=_setup_context)


def gaussian(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Run the operator, and return result [B, C] and log mass [B].

    Args:
        arguments: its operands and options.

    """
    result, log_mass, _ = torch.ops.scinet.gaussian(*arguments)
    return result, log_mass
