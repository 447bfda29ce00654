"""Pairwise-complete, weighted Pearson correlation between columns, at once or streamed.

Shapes: N rows, C classes (columns). For columns a, b the pair weight of row n is the *product* of its cell weights,
`w_na w_nb`, 0 where either cell is unknown. Four float64 moments about a pivot p (z = x - p) describe every pair:

    n_ab = sum w_a w_b     sx_ab = sum w_a w_b z_a     sxx_ab = sum w_a w_b z_a^2     sxy_ab = sum w_a w_b z_a z_b

They are sums, so batches, states and ranks about one pivot simply add. A pairwise-complete matrix need not be positive
semidefinite. Source: kernels.md sections 2 and 5.5, method.md section 3.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from scinet_kernels import checks, dispatch, sharded
from scinet_kernels.moments import column_sums, has_narrow_products, moments, rebased

# A variance below this share of the second moment about the pivot is rounding of a constant. Equal terms all round the
# same way: fp32 products err by 8e-6 where 384 rows are added in turn (measured, MKL), so by 2e-5 where all of
# moments.BLOCK_ROWS are; float64 ones by under 1e-13.
_RELATIVE_VARIANCE = 1e-12
_RELATIVE_VARIANCE_FP32 = 2.0**-15
# Sums of squares below this have lost digits to the smallest fp32 number.
_SMALLEST_VARIANCE_FP32 = 1e-30
_STATE_FIELDS = ("pivot", "weight", "total", "moments", "is_narrow")


def _correlation(sums: Tensor, is_narrow: Tensor, min_count: float, undefined: float) -> tuple[Tensor, Tensor]:
    """Correlation and count [C, C] from the moments; exactly symmetric, diagonal 1 where defined."""
    count, first, second, cross = sums
    count, cross = (count + count.T) / 2, (cross + cross.T) / 2  # a matrix product may differ in the last bit
    divisor = torch.where(count > 0, count, 1)
    variance = second - first.square() / divisor
    in_fp32 = second * _RELATIVE_VARIANCE_FP32 + _SMALLEST_VARIANCE_FP32
    varies = variance > torch.where(is_narrow > 0, in_fp32, second * _RELATIVE_VARIANCE)
    is_defined = (count > 0) & (count >= min_count) & varies & varies.T
    deviation = torch.where(is_defined, variance, 1).sqrt()
    correlation = ((cross - first * first.T / divisor) / (deviation * deviation.T)).clamp(-1, 1)
    diagonal = torch.eye(count.shape[0], dtype=torch.bool, device=count.device)
    return torch.where(is_defined, torch.where(diagonal, 1, correlation), undefined), count


def _mean(weight: Tensor, total: Tensor) -> Tensor:
    """Weighted column mean [C] of what was observed, 0 where nothing was."""
    return torch.where(weight > 0, total / torch.where(weight > 0, weight, 1), 0)


def pearson(
    values: Tensor,
    known: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    min_count: float = 2,
    undefined: float = 0.0,
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Correlate every pair of columns over the rows where both are known. Collective where `group` is given.

    Args:
        values: [N, C] floating point; what stands in unknown cells is never read.
        known: [N, C] bool, or None: every cell is known.
        weights: [N, C] floating-point cell weights, or None: 1. The weight of a row for a pair is the product of its
            two cell weights. A cell of weight <= 0 is unknown.
        min_count: pairs with a smaller (weighted) count are undefined.
        undefined: correlation given to them, to pairs with a constant column, and to the diagonal of such columns.
        backend: "auto", "triton" (fp32 and half), "cpu" (blocks of rows, any device) or "reference" (whole array in
            float64, the only one differentiable twice). "auto" is "reference" for float64 values.
        group: process group; `values` are then this rank's rows (possibly none) and the moments are summed. The
            gradient is that of the sum of all ranks' losses.

    Returns:
        (correlation [C, C] in [-1, 1], count [C, C]: the weighted co-observations n_ab), in the dtype of the values
        promoted to at least fp32. Differentiable in values and positive weights, zero gradient in undefined pairs and
        on the diagonal.

        A column is constant for a pair if its deviation on the common rows is below 1e-6 of its distance to the
        column's overall mean; 6e-3 where fp32 and half values are multiplied in fp32 (all but "reference"), which
        also takes a sum of squared deviations below 1e-30 for constant.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, device or name does not fit, or "triton" cannot run these values.

    Source: kernels.md section 2.

    """
    checks.check_backend(backend)
    checks.check_cells(values, known, weights)
    chosen = dispatch.choose("pearson", backend, values, rows=values.shape[0])
    zero = values.new_zeros(values.shape[1], dtype=torch.float64)
    totals = column_sums(values, known, weights, zero, chosen)
    if group is not None:
        totals = sharded.sum_over_ranks(totals, group)
    sums = moments(values, known, weights, _mean(*totals), chosen)
    if group is not None:
        sums = sharded.sum_over_ranks(sums, group)
    is_narrow = zero.new_full((), float(has_narrow_products(values, chosen)))
    correlation, count = _correlation(sums, is_narrow, min_count, undefined)
    dtype = torch.promote_types(values.dtype, torch.float32)
    return correlation.to(dtype), count.to(dtype)


class PearsonState:
    """Streamed, mergeable Pearson correlation with optional exponential forgetting; carries no gradient.

    All sums are float64, about a pivot per column: the weighted mean of the first update that observes the column.
    Once an update was multiplied in fp32, the state reads constant columns by the fp32 rule of `pearson`.

    With several ranks keep one state per rank, update it with that rank's rows, and read an all-reduced *copy*
    (`copy.deepcopy`): all operations are linear, so that equals one state that saw all rows.

    Args:
        num_classes: C.
        decay: factor in (0, 1] on the old moments at each update; 1 forgets nothing.
        device: where the moments live; updates must come from there.
        backend: of the updates, as in `pearson`; "auto" decides by each update's dtype.

    """

    def __init__(
        self, num_classes: int, *, decay: float = 1.0, device: torch.device | str = "cpu", backend: str = "auto"
    ) -> None:
        checks.check_at_least_one("num_classes", num_classes)
        checks.check_backend(backend)
        self.num_classes = num_classes
        self.decay = _checked_decay(decay)
        self.backend = backend
        self._pivot = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self._weight = torch.zeros_like(self._pivot)  # sum of cell weights, [C]
        self._total = torch.zeros_like(self._pivot)  # sum of cell weight times (value - pivot), [C]
        self._moments = self._pivot.new_zeros(4, num_classes, num_classes)
        self._is_narrow = self._pivot.new_zeros(())  # 1 once products in fp32 went into the moments

    @torch.no_grad()
    def update(
        self,
        values: Tensor,
        known: Tensor | None = None,
        weights: Tensor | None = None,
        decay: float | None = None,
    ) -> None:
        """Forget a little, then add rows.

        Args:
            values: [N, C] floating point, N may be 0; unknown cells are never read.
            known: [N, C] bool, or None: every cell is known.
            weights: [N, C] cell weights as in `pearson`, or None: 1.
            decay: factor on the old moments, in (0, 1]; None takes the constructor's.

        Raises:
            TypeError: a dtype does not fit.
            ValueError: a shape, device or range does not fit.

        """
        checks.check_cells(values, known, weights)
        checks.check_same_device("values", values, "the state", self._pivot)
        if values.shape[1] != self.num_classes:
            raise ValueError(f"values have {values.shape[1]} columns but the state has {self.num_classes} classes.")
        factor = self.decay if decay is None else _checked_decay(decay)
        chosen = dispatch.choose("pearson", self.backend, values, rows=values.shape[0])
        if self._pivot.device.type != "cpu" or not (self._weight > 0).all():  # asking a GPU would make the host wait
            sums = column_sums(values, known, weights, torch.zeros_like(self._pivot), chosen)
            # A column not observed so far has only zero moments: any pivot is right, and its first mean is the best, in
            # digits that fp32 products know too.
            self._pivot = torch.where(self._weight > 0, self._pivot, _mean(*sums).float().double())
        added = moments(values, known, weights, self._pivot, chosen)
        if weights is None:  # the diagonals hold the columns' own sums
            sums = added[:2].diagonal(dim1=1, dim2=2)
        else:  # not by subtraction from the sums above: a large mean would cost digits
            sums = column_sums(values, known, weights, self._pivot, chosen)
        self._weight = factor * self._weight + sums[0]
        self._total = factor * self._total + sums[1]
        self._moments.mul_(factor).add_(added)
        if has_narrow_products(values, chosen):
            self._is_narrow = torch.ones_like(self._is_narrow)

    @torch.no_grad()
    def merge(self, other: "PearsonState") -> None:
        """Add what another state saw; the other is left as it is.

        Args:
            other: state of as many classes.

        Raises:
            ValueError: the numbers of classes or the devices differ.

        """
        if other.num_classes != self.num_classes:
            raise ValueError(f"cannot merge {other.num_classes} classes into {self.num_classes}.")
        checks.check_same_device("the other state", other._pivot, "the state", self._pivot)
        self._rebase(torch.where(self._weight > 0, self._pivot, other._pivot))
        shift = torch.where(other._weight > 0, other._pivot - self._pivot, 0)
        self._moments = self._moments + rebased(other._moments, shift)
        self._total = self._total + other._total + shift * other._weight
        self._weight = self._weight + other._weight
        self._is_narrow = torch.maximum(self._is_narrow, other._is_narrow)

    @torch.no_grad()
    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Replace the state on every rank by the merger of all ranks' states. Collective.

        Calling it twice, or updating and calling again, counts the same rows once per rank: reduce a copy instead.

        Args:
            group: process group; None is the default group, as in torch.distributed.

        """
        has_seen = (self._weight > 0).double()
        votes = torch.stack([has_seen, has_seen * self._pivot, self._is_narrow.expand_as(has_seen)])
        dist.all_reduce(votes, group=group)
        self._rebase(_mean(*votes[:2]))
        self._is_narrow = (votes[2, 0] > 0).double()
        flat = torch.cat([self._weight, self._total, self._moments.flatten()])
        dist.all_reduce(flat, group=group)
        flat = flat.view(-1, self.num_classes)
        self._weight, self._total = flat[0], flat[1]
        self._moments = flat[2:].view_as(self._moments)

    def correlation(self, min_count: float = 2, *, undefined: float = 0.0) -> tuple[Tensor, Tensor]:
        """Read the correlation.

        Args:
            min_count: pairs with a smaller (weighted, decayed) count are undefined.
            undefined: correlation given to them and to pairs with a constant column.

        Returns:
            (correlation [C, C] in [-1, 1], count [C, C]), float64.

        """
        return _correlation(self._moments, self._is_narrow, min_count, undefined)

    def mean(self) -> tuple[Tensor, Tensor]:
        """Read the weighted mean of each column over its known cells.

        Returns:
            (mean [C], 0 where nothing was observed; weight [C], the decayed sum of cell weights), float64.

        """
        return torch.where(self._weight > 0, self._pivot + _mean(self._weight, self._total), 0), self._weight.clone()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that was observed, for a checkpoint; `decay` and `backend` are configuration and not in it.

        Returns:
            Float64 tensors: pivot [C], weight [C], total [C], moments [4, C, C], is_narrow [] (1 once products in
            fp32 went into the moments).

        """
        return {name: getattr(self, f"_{name}").clone() for name in _STATE_FIELDS}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state by a saved one, keeping this state's device.

        Args:
            state: what `state_dict` gave, from any number of ranks and any device.

        Raises:
            ValueError: a field is missing or too many, or has another shape.

        """
        state = {"is_narrow": torch.zeros_like(self._is_narrow), **state}  # older states were float64 throughout
        if set(state) != set(_STATE_FIELDS):
            raise ValueError(f"a PearsonState holds {sorted(_STATE_FIELDS)}, the saved one {sorted(state)}.")
        for name in _STATE_FIELDS:
            mine: Tensor = getattr(self, f"_{name}")
            if state[name].shape != mine.shape:
                raise ValueError(f"saved {name} has shape {list(state[name].shape)}, needed {list(mine.shape)}.")
        for name in _STATE_FIELDS:
            mine = getattr(self, f"_{name}")
            setattr(self, f"_{name}", state[name].to(mine).clone())

    def _rebase(self, pivot: Tensor) -> None:
        """Move to another pivot, exactly in exact arithmetic."""
        shift = torch.where(self._weight > 0, self._pivot - pivot, 0)
        self._moments = rebased(self._moments, shift)
        self._total = self._total + shift * self._weight
        self._pivot = pivot


def _checked_decay(decay: float) -> float:
    if not 0 < decay <= 1:
        raise ValueError(f"decay={decay} must lie in (0, 1].")
    return decay
