"""The backward of the Triton path: a kernel writes panels of query rows by all keys, library products do the rest.

Shapes: B queries, M keys, D embedding, C classes, b rows of a panel, as many as the workspace holds. Formulas as in
`blocked_backward.py`. Accumulators as wide as D do not fit a program's registers, and splitting D would compute every
weight D / 128 times (kernels.md section 3). All gradients are fp32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from scinet_kernels import gaussian_triton
from scinet_kernels.blocked_backward import Gradients, Needs
from scinet_kernels.tiling import Problem


def backward(
    problem: Problem, result: Tensor, log_mass: Tensor, grad_result: Tensor, grad_log_mass: Tensor, needs: Needs
) -> Gradients:
    """Differentiate :func:`scinet_kernels.gaussian_triton.forward`.

    Args:
        problem: the operands of the forward.
        result: [B, C] its first result.
        log_mass: [B] its last result, to base 2.
        grad_result: [B, C].
        grad_log_mass: [B].
        needs: which gradients are wanted; that of `queries` includes their part as keys where the queries are the keys.

    """
    sums = _Sums(problem, needs)
    operands = gaussian_triton.prepare(problem)
    values, result = _centred(problem, result)
    signal = grad_result.to(values.dtype)
    offset = torch.linalg.vecdot(signal.float(), result) - grad_log_mass
    for rows, worth, weights in _panels(problem, needs):
        gaussian_triton.write_panel(
            problem, operands, rows, values, signal[rows], offset[rows], log_mass[rows], worth, weights
        )
        if weights is not None:
            sums.values += _product(weights.T, signal[rows].to(weights.dtype))
            sums.offsets += _product(weights.T, offset[rows, None].to(weights.dtype))[:, 0]
        sums.add(rows, worth, operands)
    return sums.finish(operands, values)


def _centred(problem: Problem, result: Tensor) -> tuple[Tensor, Tensor]:
    """Centre fp32 values, and the result with them: it changes no gradient and saves them from cancellation."""
    if problem.values is None:
        return problem.queries.new_zeros(len(problem.keys), 0, dtype=torch.float32), result
    if problem.values.dtype != torch.float32 or not len(problem.values):
        return problem.values, result
    mean = problem.values.mean(0).nan_to_num(0, 0, 0)
    return problem.values - mean, result - mean


def _panels(problem: Problem, needs: Needs) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield rows and the panels [b, M] for worth and weights, which are overwritten each time."""
    num_rows, num_keys = len(problem.queries), len(problem.keys)
    if not num_rows or not num_keys:
        return
    needs_weights = needs.values or needs.key_weights
    # fp16 would lose small weights
    is_bf16 = problem.queries.dtype == problem.keys.dtype == torch.bfloat16
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    size = problem.workspace_bytes // (num_keys * dtype.itemsize * (1 + needs_weights))
    size = min(num_rows, max(16, size // 16 * 16))
    panels = [torch.empty(size, num_keys, dtype=dtype, device=problem.queries.device) for _ in range(1 + needs_weights)]
    for start in range(0, num_rows, size):
        rows = slice(start, min(start + size, num_rows))
        worth, *weights = (panel[: rows.stop - start] for panel in panels)
        yield rows, worth, weights[0] if weights else None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply to fp32, also from bf16, whose own product would round each sum."""
    if left.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


class _Sums:
    """What the panels add up to."""

    def __init__(self, problem: Problem, needs: Needs) -> None:
        self._problem, self._needs = problem, needs
        self._is_self = problem.queries is problem.keys
        device, width = problem.queries.device, problem.queries.shape[1]
        num_rows, num_keys = len(problem.queries), len(problem.keys)
        columns = 0 if problem.values is None else problem.values.shape[1]
        self.values = torch.zeros(num_keys, columns, device=device)  # sum_i P_ij G_i
        self.offsets = torch.zeros(num_keys, device=device)  # sum_i P_ij offset_i
        self._needs_queries = needs.queries or needs.bandwidth
        self._needs_keys = needs.keys or (self._is_self and needs.queries)
        self._queries = torch.zeros(num_rows if self._needs_queries else 0, width, device=device)
        self._bandwidth = torch.zeros(num_rows, device=device)
        self._keys = torch.zeros(num_keys if self._needs_keys else 0, width, device=device)
        self._key_total = torch.zeros(num_keys, device=device)
        self._inverse = problem.bandwidth.float().reciprocal()

    def add(self, rows: slice, worth: Tensor, operands: gaussian_triton.Operands) -> None:
        """Add a panel of worth [b, M]; it is overwritten."""
        inverse = self._inverse if self._inverse.numel() == 1 else self._inverse[rows, None]
        points, keys = operands.queries[rows], operands.keys.to(worth.dtype)
        if self._needs_queries:
            towards, total = _product(worth, keys), worth.sum(1, dtype=torch.float32)
            self._queries[rows] = (towards - points * total[:, None]) * inverse.square()
            if self._needs.bandwidth:
                spread = worth.float() @ operands.key_norms
                squared = operands.query_norms[rows] * total + spread
                squared -= 2 * torch.linalg.vecdot(points.float(), towards)
                self._bandwidth[rows] = squared * inverse.reshape(-1).pow(3)
        if self._needs_keys:
            worth.mul_(inverse).mul_(inverse)
            self._keys += _product(worth.T, points.to(worth.dtype))
            self._key_total += worth.sum(0, dtype=torch.float32)

    def finish(self, operands: gaussian_triton.Operands, values: Tensor) -> Gradients:
        """Return the gradients."""
        needs, problem = self._needs, self._problem
        queries = self._queries if self._needs_queries else None
        keys = self._keys.addcmul_(operands.keys, self._key_total[:, None], value=-1) if self._needs_keys else None
        if self._is_self and queries is not None and keys is not None:
            queries, keys = queries.add_(keys), None
        bandwidth = self._bandwidth
        if problem.bandwidth.numel() == 1:
            bandwidth = bandwidth.sum().reshape(1)
        of_weights, weights = None, problem.pairs.key_weights
        if needs.key_weights and weights is not None:
            worth = torch.linalg.vecdot(values.float(), self.values) - self.offsets
            of_weights = torch.where(weights > 0, worth / weights, 0)
        return Gradients(queries, keys, self.values, bandwidth, of_weights)
