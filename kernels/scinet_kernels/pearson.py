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

from scinet_kernels import checks, sharded

# A variance below this share of the second moment about the pivot is rounding of a constant.
_RELATIVE_VARIANCE = 1e-12
_STATE_FIELDS = ("pivot", "weight", "total", "moments")


def _masked(values: Tensor, known: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Float64 values and weights, both 0 in unknown cells; selected, never multiplied, so that NaN stays out."""
    known = torch.ones_like(values, dtype=torch.bool) if known is None else known
    wide = torch.ones_like(values, dtype=torch.float64) if weights is None else weights.double()
    known = known & (wide > 0)
    return torch.where(known, values.double(), 0), torch.where(known, wide, 0)


def _moments(values: Tensor, weights: Tensor, pivot: Tensor) -> Tensor:
    """Stack n, sx, sxx, sxy [4, C, C] of masked float64 values and weights about the pivot."""
    shifted = torch.where(weights > 0, values - pivot, 0)
    weighted = weights * shifted
    return torch.stack(
        [weights.T @ weights, weighted.T @ weights, (weighted * shifted).T @ weights, weighted.T @ weighted]
    )


def _rebased(moments: Tensor, shift: Tensor) -> Tensor:
    """Moments about `pivot - shift` from moments about `pivot`: z becomes z + shift."""
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


def _correlation(moments: Tensor, min_count: float, undefined: float) -> tuple[Tensor, Tensor]:
    """Correlation and count [C, C] from the moments; exactly symmetric, diagonal 1 where defined."""
    count, first, second, cross = moments
    count, cross = (count + count.T) / 2, (cross + cross.T) / 2  # a matrix product may differ in the last bit
    divisor = torch.where(count > 0, count, 1)
    variance = second - first.square() / divisor
    varies = variance > _RELATIVE_VARIANCE * second
    is_defined = (count > 0) & (count >= min_count) & varies & varies.T
    deviation = torch.where(is_defined, variance, 1).sqrt()
    correlation = ((cross - first * first.T / divisor) / (deviation * deviation.T)).clamp(-1, 1)
    diagonal = torch.eye(count.shape[0], dtype=torch.bool, device=count.device)
    return torch.where(is_defined, torch.where(diagonal, 1, correlation), undefined), count


def _pivot(weight: Tensor, total: Tensor) -> Tensor:
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
        backend: "auto" or "reference".
        group: process group; `values` are then this rank's rows (possibly none) and the moments are summed. The
            gradient is that of the sum of all ranks' losses.

    Returns:
        (correlation [C, C] in [-1, 1], count [C, C]: the weighted co-observations n_ab), in the dtype of the values
        promoted to at least fp32; computed in float64. Differentiable in values and positive weights, zero gradient
        in undefined pairs and on the diagonal.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, device or name does not fit.

    Source: kernels.md section 2.

    """
    checks.check_backend(backend)
    checks.check_cells(values, known, weights)
    cells, wide = _masked(values, known, weights)
    sums = torch.stack([wide.sum(0), (wide * cells).sum(0)]).detach()
    if group is not None:
        sums = sharded.sum_over_ranks(sums, group)
    moments = _moments(cells, wide, _pivot(*sums))
    if group is not None:
        moments = sharded.sum_over_ranks(moments, group)
    correlation, count = _correlation(moments, min_count, undefined)
    dtype = torch.promote_types(values.dtype, torch.float32)
    return correlation.to(dtype), count.to(dtype)


class PearsonState:
    """Streamed, mergeable Pearson correlation with optional exponential forgetting; carries no gradient.

    Everything is float64, about a pivot per column: the weighted mean of the first update that observes the column.

    With several ranks keep one state per rank, update it with that rank's rows, and read an all-reduced *copy*
    (`copy.deepcopy`): all operations are linear, so that equals one state that saw all rows.

    Args:
        num_classes: C.
        decay: factor in (0, 1] on the old moments at each update; 1 forgets nothing.
        device: where the moments live; updates must come from there.

    """

    def __init__(self, num_classes: int, *, decay: float = 1.0, device: torch.device | str = "cpu") -> None:
        checks.check_at_least_one("num_classes", num_classes)
        self.num_classes = num_classes
        self.decay = _checked_decay(decay)
        self._pivot = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self._weight = torch.zeros_like(self._pivot)  # sum of cell weights, [C]
        self._total = torch.zeros_like(self._pivot)  # sum of cell weight times (value - pivot), [C]
        self._moments = self._pivot.new_zeros(4, num_classes, num_classes)

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
        cells, wide = _masked(values, known, weights)
        weight = wide.sum(0)
        # A column not observed so far has only zero moments: any pivot is right, and its first mean is the best.
        self._pivot = torch.where(self._weight > 0, self._pivot, _pivot(weight, (wide * cells).sum(0)))
        self._weight = factor * self._weight + weight
        self._total = factor * self._total + (wide * torch.where(wide > 0, cells - self._pivot, 0)).sum(0)
        self._moments = factor * self._moments + _moments(cells, wide, self._pivot)

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
        self._moments = self._moments + _rebased(other._moments, shift)
        self._total = self._total + other._total + shift * other._weight
        self._weight = self._weight + other._weight

    @torch.no_grad()
    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Replace the state on every rank by the merger of all ranks' states. Collective.

        Calling it twice, or updating and calling again, counts the same rows once per rank: reduce a copy instead.

        Args:
            group: process group; None is the default group, as in torch.distributed.

        """
        has_seen = (self._weight > 0).double()
        votes = torch.stack([has_seen, has_seen * self._pivot])
        dist.all_reduce(votes, group=group)
        self._rebase(_pivot(*votes))
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
        return _correlation(self._moments, min_count, undefined)

    def mean(self) -> tuple[Tensor, Tensor]:
        """Read the weighted mean of each column over its known cells.

        Returns:
            (mean [C], 0 where nothing was observed; weight [C], the decayed sum of cell weights), float64.

        """
        return torch.where(self._weight > 0, self._pivot + _pivot(self._weight, self._total), 0), self._weight.clone()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that was observed, for a checkpoint; `decay` is configuration and not in it.

        Returns:
            Float64 tensors: pivot [C], weight [C], total [C], moments [4, C, C].

        """
        return {name: getattr(self, f"_{name}").clone() for name in _STATE_FIELDS}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state by a saved one, keeping this state's device.

        Args:
            state: what `state_dict` gave, from any number of ranks and any device.

        Raises:
            ValueError: a field is missing or too many, or has another shape.

        """
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
        self._moments = _rebased(self._moments, shift)
        self._total = self._total + shift * self._weight
        self._pivot = pivot


def _checked_decay(decay: float) -> float:
    if not 0 < decay <= 1:
        raise ValueError(f"decay={decay} must lie in (0, 1].")
    return decay
