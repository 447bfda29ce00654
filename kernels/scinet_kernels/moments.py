"""Masked moments of pairs of columns: the sums over rows behind pairwise-complete Pearson correlation.

Shapes: N rows, C classes (columns). With cell weights w (0 where unknown) and z = x - p about a pivot p per column:

    n_ab = sum w_a w_b     sx_ab = sum w_a w_b z_a     sxx_ab = sum w_a w_b z_a^2     sxy_ab = sum w_a w_b z_a z_b

Three backends: "reference" (whole array, float64, differentiable any number of times), "cpu" (blocks of rows, on any
device; in C on a CPU) and "triton" (forward; its backward is the blocked one). The last two multiply fp32 and half
inputs in fp32 within a block and add the blocks in float64. Source: kernels.md sections 2, 5.4 and 5.5.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scinet_kernels import compiled_moments

# Rows that one fp32 product contracts. Equal terms all round the same way, so its relative error grows with them.
BLOCK_ROWS = 1024
# Where no product contracts the rows, a block on a GPU may be larger, so that launches do not dominate.
GPU_BLOCK_CELLS = 1 << 22


def has_narrow_products(values: Tensor, backend: str) -> bool:
    """Return whether the moments of these values are summed from fp32 products rather than float64 ones.

    Args:
        values: [N, C] floating point.
        backend: "triton", "cpu" or "reference".

    """
    return backend != "reference" and values.dtype != torch.float64


def moments(values: Tensor, known: Tensor | None, weights: Tensor | None, pivot: Tensor, backend: str) -> Tensor:
    """Sum the four moments of every pair of columns.

    Args:
        values: [N, C] floating point; what stands in unknown cells is never read.
        known: [N, C] bool, or None: every cell is known.
        weights: [N, C] floating-point cell weights, or None: 1. A cell of weight <= 0 is unknown.
        pivot: [C] float64, near the columns' means; no gradient flows to it.
        backend: "triton", "cpu" or "reference".

    Returns:
        [4, C, C] float64: n, sx, sxx, sxy. Differentiable in values and weights, once unless "reference".

    Source: kernels.md section 2.

    """
    if backend == "reference":
        return _whole_moments(*_masked(values, known, weights), pivot)
    # Subtracting a pivot that has the values' own precision is exact near the pivot: large means cost no digits.
    near = pivot.to(_product_dtype(values))
    about_near: Tensor = _Moments.apply(values, known, weights, near, backend)
    shift = near.double() - pivot
    # asking a GPU would make the host wait for longer than the arithmetic takes
    return about_near if shift.device.type == "cpu" and not shift.any() else rebased(about_near, shift)


@torch.no_grad()
def column_sums(values: Tensor, known: Tensor | None, weights: Tensor | None, pivot: Tensor, backend: str) -> Tensor:
    """Sum cell weights, and weighted differences to the pivot, over each column's known cells.

    Args:
        values: [N, C] floating point.
        known: [N, C] bool or None.
        weights: [N, C] floating point or None.
        pivot: [C] float64.
        backend: "triton" and "cpu" go a block of rows at a time, "reference" at once.

    Returns:
        [2, C] float64: sum w, sum w z.

    """
    if backend == "reference":
        cells, wide = _masked(values, known, weights)
        return torch.stack([wide.sum(0), (wide * torch.where(wide > 0, cells - pivot, 0)).sum(0)])
    near = pivot.to(_product_dtype(values))
    if compiled_moments.runs(values):
        weight, first = compiled_moments.column_sums(values, known, weights, near, BLOCK_ROWS)
        return torch.stack([weight, first + weight * (near.double() - pivot)])
    num_rows = _largest_block(values)
    ones = near.new_ones(min(num_rows, values.shape[0]))
    sums = pivot.new_zeros(2 * values.shape[1])
    for _, panel in _Blocks(values, known, weights, near, num_rows):
        sums += torch.mv(panel[:, values.shape[1] :].T, ones[: len(panel)])
    first, weight = sums.view(2, -1)
    return torch.stack([weight, first + weight * (near.double() - pivot)])


def rebased(moments: Tensor, shift: Tensor) -> Tensor:
    """Move moments to the pivot `pivot - shift`: z becomes z + shift.

    Args:
        moments: [4, C, C] float64.
        shift: [C] float64.

    Returns:
        [4, C, C], equal in exact arithmetic to the moments about the other pivot.

    """
    count, first, second, cross = moments
    mine, other = shift[:, None], shift[None, :]
    return torch.stack(
        [
            count,
            first + mine * count,
            second + 2 * mine * first + mine**2 * count,
            cross + other * first + mine * first.T + mine * other * count,
        ]
    )


def _product_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _largest_block(values: Tensor) -> int:
    """Rows of a block where no product contracts them."""
    if values.device.type == "cpu":
        return BLOCK_ROWS  # what fits into a core's cache
    return max(BLOCK_ROWS, GPU_BLOCK_CELLS // max(1, values.shape[1]))


def _masked(values: Tensor, known: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Float64 values and weights, both 0 in unknown cells; selected, never multiplied, so that NaN stays out."""
    known = torch.ones_like(values, dtype=torch.bool) if known is None else known
    wide = torch.ones_like(values, dtype=torch.float64) if weights is None else weights.double()
    known = known & (wide > 0)
    return torch.where(known, values.double(), 0), torch.where(known, wide, 0)


def _whole_moments(values: Tensor, weights: Tensor, pivot: Tensor) -> Tensor:
    """Moments of masked float64 values and weights."""
    shifted = torch.where(weights > 0, values - pivot, 0)
    weighted = weights * shifted
    return torch.stack(
        [weights.T @ weights, weighted.T @ weights, (weighted * shifted).T @ weights, weighted.T @ weighted]
    )


class _Blocks:
    """Iterates over blocks of rows; each turn refills one panel [rows, 3 C], the columns z^2 w | z w | w side by side.

    Everything is written into reused memory (fresh pages are slow), and cells are selected by an integer product of
    their bits with 0 or 1: that keeps NaN out like `torch.where`, which is twenty times slower on a CPU.

    Attributes:
        shifted: [rows, C] z of the current block, 0 in unknown cells.

    """

    def __init__(
        self, values: Tensor, known: Tensor | None, weights: Tensor | None, pivot: Tensor, num_rows: int
    ) -> None:
        self._values, self._known, self._weights, self._pivot = values, known, weights, pivot
        self._num_rows = num_rows
        rows, num_classes = min(num_rows, values.shape[0]), values.shape[1]
        self._panel = pivot.new_ones(rows, 3 * num_classes)  # the weights stay 1 where there are none
        self._bits = torch.int64 if pivot.dtype == torch.float64 else torch.int32
        self._mask: Tensor | None = None
        if known is not None or weights is not None:
            self._mask = torch.empty(rows, num_classes, dtype=self._bits, device=values.device)
        # Without weights z w = z, in the panel itself.
        self._shifted = None if weights is None else pivot.new_empty(rows, num_classes)
        self.shifted = self._panel[:, num_classes : 2 * num_classes] if self._shifted is None else self._shifted

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self._values.shape[0], self._num_rows):
            rows = slice(start, start + self._num_rows)
            yield rows, self._fill(rows)

    def select(self, tensor: Tensor) -> None:
        """Set a tensor [rows, C] to 0 in the current block's unknown cells, in place."""
        if self._mask is not None:
            tensor.view(self._bits).mul_(self._mask[: len(tensor)])

    def _fill(self, rows: slice) -> Tensor:
        values = self._values[rows]
        panel = self._panel[: len(values)]
        squared, first, weight = panel.tensor_split(3, dim=1)
        self.shifted = first if self._shifted is None else self._shifted[: len(values)]
        torch.sub(values, self._pivot, out=self.shifted)
        if self._mask is not None:
            self._fill_weight(weight, self._mask[: len(values)], rows)
        self.select(self.shifted)
        if self._weights is not None:
            torch.mul(self.shifted, weight, out=first)
        torch.mul(first, self.shifted, out=squared)
        return panel

    def _fill_weight(self, weight: Tensor, mask: Tensor, rows: slice) -> None:
        if self._weights is None and self._known is not None:
            weight.copy_(mask.copy_(self._known[rows]))
        elif self._weights is not None:
            mask.copy_(self._weights[rows] > 0)
            if self._known is not None:
                mask.mul_(self._known[rows])
            self.select(weight.copy_(self._weights[rows]))


class _Moments(torch.autograd.Function):
    """Blocked or fused moments about a pivot in the precision of the products."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, known: Tensor | None, weights: Tensor | None, pivot: Tensor, backend: str
    ) -> Tensor:
        ctx.save_for_backward(values, known, weights, pivot)
        if backend == "triton":
            from scinet_kernels import pearson_triton

            return pearson_triton.moments(values, known, weights, pivot)
        if compiled_moments.runs(values):
            return compiled_moments.moments(values, known, weights, pivot, BLOCK_ROWS)
        return _blocked_moments(values, known, weights, pivot)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        values, known, weights, pivot = ctx.saved_tensors
        of_values = torch.empty_like(values) if ctx.needs_input_grad[0] else None
        of_weights = torch.empty_like(weights) if ctx.needs_input_grad[2] else None
        with torch.autocast(values.device.type, enabled=False):  # the forward writes into given memory, which is exempt
            blocks = _Blocks(values, known, weights, pivot, _largest_block(values))
            _fill_gradients(blocks, gradient.to(pivot.dtype), of_values, of_weights)
        return of_values, None, of_weights, None, None


def _blocked_moments(values: Tensor, known: Tensor | None, weights: Tensor | None, pivot: Tensor) -> Tensor:
    num_classes = values.shape[1]
    to_weight = pivot.new_empty(3 * num_classes, num_classes)  # sxx, sx, n: the products with w
    cross = pivot.new_empty(num_classes, num_classes)
    total = pivot.new_zeros(4, num_classes, num_classes, dtype=torch.float64)
    for _, panel in _Blocks(values, known, weights, pivot, BLOCK_ROWS):
        _, first, weight = panel.tensor_split(3, dim=1)
        torch.mm(panel.T, weight, out=to_weight)
        torch.mm(first.T, first, out=cross)
        total[:3] += to_weight.view(3, num_classes, num_classes)
        total[3] += cross
    second, first, count, cross = total
    return torch.stack([count, first, second, cross])


def _fill_gradients(blocks: _Blocks, gradient: Tensor, of_values: Tensor | None, of_weights: Tensor | None) -> None:
    """Write the gradients of the cells, given that of the moments [4, C, C].

    With W the weights and Z = Wz, Q = Wz^2 the panel's other columns: n = W'W, sx = Z'W, sxx = Q'W, sxy = Z'Z.
    """
    count, first, second, cross = gradient
    onto_first = torch.cat([cross + cross.T, first.T])  # from [Z | W] to the gradient of Z
    onto_squared = second.T.contiguous()  # from W to the gradient of Q
    onto_weight = torch.cat([second, first, count + count.T])  # from [Q | Z | W] to the gradient of W
    num_classes = count.shape[0]
    for rows, panel in blocks:
        weight = panel[:, 2 * num_classes :]
        of_first = torch.mm(panel[:, num_classes:], onto_first)
        slope = torch.mm(weight, onto_squared).mul_(blocks.shifted)
        of_first += slope
        if of_weights is not None:
            of_weight = torch.mm(panel, onto_weight).addcmul_(blocks.shifted, of_first)
            blocks.select(of_weight)
            of_weights[rows] = of_weight
        if of_values is not None:
            of_first.add_(slope).mul_(weight)
            blocks.select(of_first)
            of_values[rows] = of_first
