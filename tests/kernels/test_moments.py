"""Blocked moments against whole float64 ones: block edges, strides, precision, memory, gradients.

All of it twice: blocks in C, blocks in PyTorch.
"""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scinet_kernels import PearsonState, pearson, tiling
from scinet_kernels.moments import BLOCK_ROWS, column_sums, moments
from tests.kernels.inner_loops import inner_loops

EDGES = [0, 1, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 2 * BLOCK_ROWS + 77]


@pytest.fixture(params=["C", "PyTorch"], scope="module", autouse=True)
def _path(request: pytest.FixtureRequest) -> Iterator[None]:
    with inner_loops(request.param):
        yield


def cells(seed: int, num_rows: int, num_classes: int, known_ratio: float = 0.6) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated float64 columns, a mask, and weights of which some are 0 and some negative."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(num_rows, 1, generator=generator, dtype=torch.float64)
    values = common + torch.randn(num_rows, num_classes, generator=generator, dtype=torch.float64)
    known = torch.rand(num_rows, num_classes, generator=generator) < known_ratio
    weights = torch.rand(num_rows, num_classes, generator=generator, dtype=torch.float64) - 0.1
    return values, known, weights.masked_fill(weights < -0.05, 0)


def spread(tensor: Tensor) -> Tensor:
    """Hold the same elements transposed and with gaps, no stride of which is a number of rows or columns here."""
    buffer = tensor.new_zeros(2 * tensor.shape[1], 5 * tensor.shape[0])
    view = buffer[::2, ::5].T
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("num_rows", EDGES)
@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("has_weights", [False, True])
def test_blocks_equal_the_whole_with_gradients(num_rows: int, has_mask: bool, has_weights: bool) -> None:
    values, known, weights = cells(num_rows, num_rows, 3)
    if has_weights:
        values = values.masked_fill(weights <= 0, torch.nan)
    if has_mask:
        values = values.masked_fill(~known, torch.nan)
        weights = weights.masked_fill(~known, torch.nan)
    pivot = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)
    signal = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = known if has_mask else None
    found = []
    for backend, arrange in (("reference", torch.clone), ("cpu", torch.clone), ("cpu", spread)):
        leaves = [arrange(values).requires_grad_()] + ([arrange(weights).requires_grad_()] if has_weights else [])
        cell_weights = leaves[1] if has_weights else None
        own_mask = None if mask is None else arrange(mask)
        result = moments(leaves[0], own_mask, cell_weights, pivot, backend)
        gradients = torch.autograd.grad((result * signal).sum(), leaves)
        found.append([result.detach(), *gradients, column_sums(leaves[0], own_mask, cell_weights, pivot, backend)])
    for other in found[1:]:
        for actual, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-9)
            assert torch.isfinite(actual).all()


@pytest.mark.parametrize("is_weighted", [False, True])
def test_moments_are_about_the_given_pivot_when_fp32_does_not_know_it(is_weighted: bool) -> None:
    _, known, weights = cells(2, 700, 3)
    # numbers and weights with few digits, so that products in fp32 are exact and nothing but the pivot can differ
    steps = torch.randint(-8, 9, (700, 3), generator=torch.Generator().manual_seed(0))
    values, weights = 1e4 + steps.float() / 1024, (weights * 4).round().float()
    pivot = torch.tensor([1e4 + 0.0004, 1e4 - 0.0003, 1e4 + 0.25 / 1024], dtype=torch.float64)
    assert (pivot != pivot.float()).all()
    for fold in (moments, column_sums):
        found, exact = (
            fold(values, known, weights if is_weighted else None, pivot, how) for how in ("cpu", "reference")
        )
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_fp32_products_keep_seven_digits(dtype: torch.dtype, is_weighted: bool) -> None:
    values, known, weights = cells(3, 6000, 20, 0.4)
    values, weights = values.to(dtype), weights.to(dtype)
    expected, expected_count = pearson(values.double(), known, weights=weights.double() if is_weighted else None)
    actual, count = pearson(values, known, weights=weights if is_weighted else None)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-7 if is_weighted else 1e-7)
    torch.testing.assert_close(count.double(), expected_count, rtol=3e-7, atol=0)


def test_variance_of_a_hundredth_survives_a_mean_of_ten_thousand_in_fp32() -> None:
    values, known, _ = cells(4, 5000, 6)
    values = (values / 2**0.5 * 0.1 + 1e4).float()
    expected, _ = pearson(values.double(), known)
    torch.testing.assert_close(pearson(values, known)[0].double(), expected, rtol=0, atol=1e-7)
    leaf, wide = values.clone().requires_grad_(), values.double().requires_grad_()
    pearson(leaf, known)[0].square().sum().backward()
    pearson(wide, known)[0].square().sum().backward()
    assert leaf.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-4, atol=1e-6 * float(wide.grad.abs().max()))


def test_state_of_fp32_updates_equals_one_pass() -> None:
    values, known, weights = cells(5, 3000, 8)
    values = (values + 1e4).float()
    for cell_weights in (None, weights.float()):
        whole, _ = pearson(values.double(), known, weights=cell_weights)
        state = PearsonState(8)
        for start in range(0, 3000, 250):
            rows = slice(start, start + 250)
            state.update(values[rows], known[rows], None if cell_weights is None else cell_weights[rows])
        torch.testing.assert_close(state.correlation()[0], whole, rtol=0, atol=1e-6)
        wide = torch.where(known, 1.0 if cell_weights is None else cell_weights.clamp_min(0), 0.0).double()
        mean, weight = state.mean()
        torch.testing.assert_close(weight, wide.sum(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(mean, (wide * values.double()).sum(0) / wide.sum(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize(("here", "elsewhere"), [(0.1, 0.7), (0.7, 0.1), (1e4, 1.001e4), (0.0, 1.0), (1 / 3, -1 / 3)])
def test_a_constant_on_common_rows_is_no_noise_in_fp32(here: float, elsewhere: float, is_weighted: bool) -> None:
    for num_rows in (40, 1500, 9000):
        values, known, weights = cells(num_rows, num_rows, 3)
        values[:, 0] = torch.where(known[:, 1], here, elsewhere)
        known[:, 0] = True
        values, weights = values.float(), weights.float() + 0.05
        cell_weights = weights if is_weighted else None
        state = PearsonState(3)
        for start in range(0, num_rows, 700):
            rows = slice(start, start + 700)
            state.update(values[rows], known[rows], None if cell_weights is None else cell_weights[rows])
        for correlation in (pearson(values, known, weights=cell_weights)[0], state.correlation()[0]):
            assert correlation[0, 1] == correlation[1, 0] == 0
            assert correlation[0, 0] == correlation[1, 1] == 1
            assert correlation[0, 2] != 0


@pytest.mark.parametrize("constant", [0.1, 1 / 3, 1e4, 12345.678, 1e-8])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_a_constant_column_is_undefined_in_fp32(constant: float, is_weighted: bool) -> None:
    values, known, weights = cells(6, 7000, 3)
    values[:, 1] = constant
    values = values.float().requires_grad_()
    correlation, _ = pearson(values, known, weights=weights.float() if is_weighted else None)
    assert (correlation[1] == 0).all()
    assert correlation[0, 2] != 0
    assert (torch.autograd.grad(correlation.sum(), values)[0][:, 1] == 0).all()


def test_small_deviation_beside_a_distant_pivot_is_kept_in_fp32() -> None:
    values, known, _ = cells(7, 4000, 2)
    known[:, 0] = True
    known[:, 1] = torch.arange(4000) < 2000
    values[:, 0] = torch.where(known[:, 1], 1.0 + 0.02 * values[:, 0], -1.0)  # deviation 3 % of the distance
    values = values.float()
    expected, _ = pearson(values.double(), known)
    torch.testing.assert_close(pearson(values, known)[0].double(), expected, rtol=0, atol=2e-3)
    assert expected[0, 1] > 0.4


def test_columns_too_small_for_fp32_squares_are_constant_rather_than_noise() -> None:
    values, known, _ = cells(8, 500, 3)
    for scale, is_kept in ((1e-10, True), (1e-19, False), (1e-22, False)):
        small = values.clone()
        small[:, 0] *= scale
        expected, _ = pearson(small.float().double(), known)
        actual, _ = pearson(small.float(), known)
        torch.testing.assert_close(actual[0], expected.float()[0] if is_kept else torch.zeros(3), rtol=0, atol=1e-6)


class _Allocations(TorchDispatchMode):
    """Notes the largest storage that an operator makes anew."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def test_memory_does_not_grow_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "_buffers", threading.local())  # what earlier calls left may be larger
    values, known, weights = cells(9, 30 * BLOCK_ROWS, 8)
    values, weights = values.float().requires_grad_(), weights.float()
    with _Allocations(values, known, weights) as noted:
        correlation, _ = pearson(values, known, weights=weights)
    block = (3 * BLOCK_ROWS * 8 + 4 * 8**2) * 4  # the panel z^2 w | z w | w in fp32, and its products
    assert noted.largest <= block * torch.get_num_threads()
    with _Allocations(values, known, weights) as noted:
        correlation.sum().backward()
    assert noted.largest <= values.numel() * 4  # the gradient itself


def test_only_the_reference_is_differentiable_twice() -> None:
    values, known, _ = cells(10, 8, 2, 0.9)
    leaf = values.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: pearson(x, known)[0], (leaf,))  # float64: auto is the reference
    gradient = torch.autograd.grad(pearson(leaf, known, backend="cpu")[0][0, 1], leaf, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_auto_takes_blocks_for_fp32_and_the_whole_for_float64() -> None:
    values, known, _ = cells(11, 5 * BLOCK_ROWS + 3, 4)
    assert torch.equal(pearson(values, known)[0], pearson(values, known, backend="reference")[0])
    assert not torch.equal(pearson(values, known)[0], pearson(values, known, backend="cpu")[0])
    narrow = values.float()
    assert torch.equal(pearson(narrow, known)[0], pearson(narrow, known, backend="cpu")[0])
    for state, update, flag in ((PearsonState(4), values, 0), (PearsonState(4), narrow, 1)):
        state.update(update, known)
        assert state.state_dict()["is_narrow"] == flag
    with pytest.raises(ValueError, match="backend"):
        PearsonState(4, backend="fast")


def test_autocast_changes_nothing() -> None:
    values, known, _ = cells(12, 300, 4)
    leaf = values.float().requires_grad_()
    expected = torch.autograd.grad(pearson(leaf, known)[0].square().sum(), leaf)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        correlation, _ = pearson(leaf, known)
        actual = torch.autograd.grad(correlation.square().sum(), leaf)[0]
    assert torch.equal(correlation, pearson(leaf, known)[0])
    assert torch.equal(actual, expected)


def test_fp32_rule_for_constants_travels_with_the_state() -> None:
    values, known, _ = cells(13, 3000, 3)
    values[:, 0] = torch.where(known[:, 1], 0.1, 0.7)
    known[:, 0] = True
    narrow = PearsonState(3)
    narrow.update(values.float(), known)
    merged = PearsonState(3)
    merged.merge(narrow)
    resumed = PearsonState(3)
    resumed.load_state_dict(narrow.state_dict())
    for state in (narrow, merged, resumed):
        assert state.correlation()[0][0, 1] == 0
    older = PearsonState(3).state_dict()
    del older["is_narrow"]
    resumed.load_state_dict(older)
    assert resumed.state_dict()["is_narrow"] == 0
