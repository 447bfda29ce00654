"""The Triton moments, interpreted or on a GPU, against float64: masks, strides, tails, splits, empty shapes.

Every operand lies inside a larger buffer of infinities (masks: of True), so that a read out of bounds shows: a row too
many makes the sums infinite, and a column too many makes numpy warn of inf - inf, which is an error here. Half inputs
are fp16: the interpreter multiplies bit patterns of bf16.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scinet_kernels import PearsonState, pearson
from scinet_kernels.moments import moments
from tests.kernels.interpreted.conftest import DEVICE

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("error::RuntimeWarning")]

MODEST = settings(deadline=None, max_examples=60)
SEEDS = st.integers(0, 2**31)
# Around the edges of a row step (16), of a split of the rows (128) and of the tiles (64 x 32 columns).
ROWS = st.sampled_from([0, 1, 2, 15, 16, 17, 90, 127, 128, 129, 200, 257])
COLUMNS = st.sampled_from([0, 1, 2, 5, 31, 32, 33, 63, 64, 65])
DTYPES = st.sampled_from([torch.float32, torch.float16])


def contiguous(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer.flatten()[7 : 7 + rows * columns].view(rows, columns)


def transposed(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer.flatten()[7 : 7 + rows * columns].view(columns, rows).T


def sliced(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[1 : 1 + 2 * rows : 2, 2 : 2 + 3 * columns : 3]


LAYOUTS = st.sampled_from([contiguous, transposed, sliced])
Layout = Callable[[Tensor, int, int], Tensor]


def placed(tensor: Tensor, layout: Layout) -> Tensor:
    """Copy into a larger buffer of infinities or True, in a layout."""
    rows, columns = tensor.shape
    filling = True if tensor.dtype == torch.bool else torch.inf
    view = layout(
        torch.full((2 * rows + 70, 3 * columns + 140), filling, dtype=tensor.dtype, device=DEVICE), rows, columns
    )
    view.copy_(tensor)
    return view


def cells(seed: int, num_rows: int, num_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated columns with NaN in unknown cells, the mask, and weights of which some are 0 and some negative."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(num_rows, 1, generator=generator)
    values = common + torch.randn(num_rows, num_classes, generator=generator)
    known = torch.rand(num_rows, num_classes, generator=generator) < 0.7
    weights = torch.rand(num_rows, num_classes, generator=generator) - 0.1
    return values.to(DEVICE, dtype), known.to(DEVICE), weights.masked_fill(weights < -0.05, 0).to(DEVICE)


@given(
    n=ROWS, c=COLUMNS, seed=SEEDS, dtype=DTYPES, has_mask=st.booleans(), has_weights=st.booleans(),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
)  # fmt: skip
@MODEST
def test_moments_equal_float64_ones(
    n: int, c: int, seed: int, dtype: torch.dtype, has_mask: bool, has_weights: bool, layouts: tuple[Layout, ...]
) -> None:
    from scinet_kernels import pearson_triton  # not where Triton may be absent: pytest imports this file everywhere

    values, known, weights = cells(seed, n, c, dtype)
    if has_weights:
        values = values.masked_fill(weights <= 0, torch.nan)
    if has_mask:
        values, weights = values.masked_fill(~known, torch.nan), weights.masked_fill(~known, torch.nan)
    values, known, weights = (placed(t, layout) for t, layout in zip((values, known, weights), layouts, strict=True))
    pivot = placed(torch.linspace(-1, 1, c, device=DEVICE)[None, :], contiguous)[0]
    mask, cell_weights = known if has_mask else None, weights if has_weights else None
    expected = moments(values, mask, cell_weights, pivot.double(), "reference")
    actual = pearson_triton.moments(values, mask, cell_weights, pivot)
    assert actual.dtype == torch.float64
    # Sums of |w w z z| are at most n |z|^2 with |z| < 8.
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-7 * 64 * max(1, n) ** 0.5)
    if not has_weights:
        assert torch.equal(actual[0], expected[0])  # counts are exact


@given(n=st.sampled_from([100, 200]), c=st.sampled_from([3, 20, 40]), seed=SEEDS, is_weighted=st.booleans())
@settings(deadline=None, max_examples=10)
def test_correlation_and_gradients_equal_float64_ones(n: int, c: int, seed: int, is_weighted: bool) -> None:
    values, known, weights = cells(seed, n, c, torch.float32)
    known[:, 0] = False  # never observed
    values[:, 1] = 0.1  # constant
    values = (values + 100).masked_fill(~known, torch.nan)
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaf = values.to(dtype, copy=True).requires_grad_()
        cell_weights = weights.to(dtype) if is_weighted else None
        correlation, count = pearson(leaf, known, weights=cell_weights, backend=backend)
        gradient = torch.autograd.grad(correlation.square().sum(), leaf)[0]
        found.append((correlation.detach().double(), count.double(), gradient.double()))
    (actual, count, gradient), (expected, expected_count, expected_gradient) = found
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(count, expected_count, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    assert (actual[:2] == 0).all()
    assert (actual[:, :2] == 0).all()
    assert torch.equal(actual, actual.T)


def test_splits_in_groups_equal_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from scinet_kernels import pearson_triton

    values, known, weights = cells(0, 600, 5, torch.float32)
    pivot = torch.zeros(5, device=DEVICE)
    whole = pearson_triton.moments(values, known, weights, pivot)  # 5 splits
    assert torch.equal(pearson_triton.moments(values, known, weights, pivot), whole)
    monkeypatch.setattr(pearson_triton, "_PARTIAL_BYTES", 2 * 16 * 25)
    torch.testing.assert_close(pearson_triton.moments(values, known, weights, pivot), whole, rtol=1e-14, atol=1e-14)


def test_large_means_and_constants_on_common_rows() -> None:
    values, known, _ = cells(1, 300, 4, torch.float32)
    values = values * 0.1 + 1e4
    values[:, 0] = torch.where(known[:, 1], 0.1, 0.7)
    known[:, 0] = True
    correlation, _ = pearson(values, known, backend="triton")
    expected, _ = pearson(values.double(), known)
    torch.testing.assert_close(correlation.double(), expected, rtol=0, atol=1e-6)
    assert correlation[0, 1] == 0
    state = PearsonState(4, device=DEVICE, backend="triton")
    for start in range(0, 300, 75):
        state.update(values[start : start + 75], known[start : start + 75])
    torch.testing.assert_close(state.correlation()[0], expected, rtol=0, atol=1e-6)


def test_float64_and_its_weights() -> None:
    values, known, weights = cells(2, 40, 3, torch.float32)
    with pytest.raises(ValueError, match="float64"):
        pearson(values.double(), known, backend="triton")
    mixed, _ = pearson(values, known, weights=weights.double(), backend="triton")
    torch.testing.assert_close(mixed, pearson(values, known, weights=weights, backend="triton")[0], rtol=0, atol=1e-6)
