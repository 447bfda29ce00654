"""The blocked path against the reference, in float64 and fp32, forward and backward, whatever the tiles.

All of it three times: tiles in C, tiles in C so small that the problems here have many, tiles in PyTorch.
"""

import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scinet_kernels import blocked, compiled_tiles, gaussian_mass, gaussian_propagate
from scinet_kernels.reference import Pairs
from scinet_kernels.tiling import Problem
from tests.kernels.inner_loops import inner_loops

MODEST = settings(deadline=None, max_examples=60)
SIZES = st.sampled_from([0, 1, 2, 3, 5, 16, 17, 31, 40])
SEEDS = st.integers(0, 2**31)


@pytest.fixture(params=["C", "C, small tiles", "PyTorch"], scope="module", autouse=True)
def _path(request: pytest.FixtureRequest) -> Iterator[None]:
    language, _, size = request.param.partition(", ")
    with inner_loops(language) as patch:
        if size == "small tiles":
            patch.setattr(compiled_tiles, "_TILE_ROWS", ((0, 4),))
            patch.setattr(compiled_tiles, "_TILE_COLUMNS", ((0, 8),))
        yield


def rows(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def both(
    leaves: dict[str, Tensor], options: dict[str, object], *, workspace_bytes: int, with_values: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """Result, mass and every gradient, by the reference and by the blocked path."""
    found = []
    for backend in ("reference", "cpu"):
        own = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
        arguments: dict[str, object] = {k: v for k, v in own.items() if k not in ("queries", "values")} | options
        arguments |= {"backend": backend, "workspace_bytes": workspace_bytes}
        mass = gaussian_mass(own["queries"], **arguments)
        signal = rows(7, len(mass), dtype=mass.dtype)
        loss = (mass.masked_fill(mass == -math.inf, 0) * signal).sum()
        outputs = [mass]
        if with_values:
            result = gaussian_propagate(own["queries"], own["values"], **arguments)
            loss = loss + (result * rows(8, *result.shape, dtype=result.dtype)).sum()
            outputs.append(result)
        wanted = [leaf for name, leaf in own.items() if with_values or name != "values"]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        found.append([*outputs, *gradients])
    return found[0], found[1]


def assert_equal(found: tuple[list[Tensor], list[Tensor]], tolerance: float = 1e-9) -> None:
    for exact, tiled in zip(*found, strict=True):
        assert tiled.dtype == exact.dtype
        torch.testing.assert_close(tiled, exact, rtol=tolerance, atol=tolerance)


@given(
    b=SIZES,
    m=SIZES,
    d=SIZES,
    c=SIZES,
    seed=SEEDS,
    workspace=st.sampled_from([1, 3000, 1 << 20]),
    has_ids=st.booleans(),
    has_weights=st.booleans(),
    radius=st.sampled_from([None, 2.0, 5.0]),
    one_bandwidth=st.booleans(),
    with_values=st.booleans(),
)
@MODEST
def test_cross_form_equals_the_reference(
    b: int, m: int, d: int, c: int, seed: int, workspace: int, has_ids: bool, has_weights: bool,
    radius: float | None, one_bandwidth: bool, with_values: bool,
) -> None:  # fmt: skip
    bandwidth = rows(seed + 3).abs() + 0.5 if one_bandwidth else rows(seed + 3, b).abs() + 0.5
    leaves = {"queries": rows(seed, b, d), "values": rows(seed + 2, m, c) + 3, "keys": rows(seed + 1, m, d)}
    leaves["bandwidth"] = bandwidth
    options: dict[str, object] = {"radius": radius}
    if has_weights:
        leaves["key_weights"] = rows(seed + 4, m)  # about half are negative: those keys do not count
    if has_ids:
        options |= {"query_ids": torch.arange(b) % 4, "key_ids": torch.arange(m) % 3}
    assert_equal(both(leaves, options, workspace_bytes=workspace, with_values=with_values))


@given(
    b=SIZES,
    d=SIZES,
    c=SIZES,
    seed=SEEDS,
    workspace=st.sampled_from([1, 3000, 20000, 1 << 20]),
    has_ids=st.booleans(),
    has_weights=st.booleans(),
    exclude=st.booleans(),
    radius=st.sampled_from([None, 2.0, 5.0]),
    one_bandwidth=st.booleans(),
)
@MODEST
def test_self_form_equals_the_reference(
    b: int, d: int, c: int, seed: int, workspace: int, has_ids: bool, has_weights: bool, exclude: bool,
    radius: float | None, one_bandwidth: bool,
) -> None:  # fmt: skip
    bandwidth = rows(seed + 3).abs() + 0.5 if one_bandwidth else rows(seed + 3, b).abs() + 0.5
    leaves = {"queries": rows(seed, b, d), "values": rows(seed + 2, b, c), "bandwidth": bandwidth}
    if has_weights:
        leaves["key_weights"] = rows(seed + 4, b)
    options: dict[str, object] = {"exclude_self": exclude, "radius": radius}
    if has_ids:
        options["query_ids"] = torch.arange(b) // 2
    assert_equal(both(leaves, options, workspace_bytes=workspace))


@given(
    b=SIZES,
    m=SIZES,
    c=SIZES,
    k=st.integers(1, 12),
    seed=SEEDS,
    workspace=st.sampled_from([1, 800, 1 << 20]),
    is_self=st.booleans(),
    has_ids=st.booleans(),
    has_weights=st.booleans(),
    on_grid=st.booleans(),
)
@MODEST
def test_neighbours_equal_the_reference(
    b: int, m: int, c: int, k: int, seed: int, workspace: int, is_self: bool, has_ids: bool, has_weights: bool,
    on_grid: bool,
) -> None:  # fmt: skip
    m = b if is_self else m
    leaves = {"queries": rows(seed, b, 3), "values": rows(seed + 1, m, c)}
    if on_grid:  # many equal distances: the lower index counts
        leaves["queries"] = leaves["queries"].round()
    if not is_self:
        leaves["keys"] = rows(seed + 2, m, 3).round() if on_grid else rows(seed + 2, m, 3)
    if has_weights:
        leaves["key_weights"] = rows(seed + 4, m)
    options: dict[str, object] = {"neighbours": k, "bandwidth": 0.9, "exclude_self": is_self}
    if has_ids:
        options["query_ids"] = torch.arange(b) % 4
        if not is_self:
            options["key_ids"] = torch.arange(m) % 3
    assert_equal(both(leaves, options, workspace_bytes=workspace))


@pytest.mark.parametrize("spread", [("queries",), ("keys",), ("values",), ("queries", "keys", "values")], ids="-".join)
@pytest.mark.parametrize("is_self", [True, False])
def test_every_stride_is_its_own(spread: tuple[str, ...], is_self: bool) -> None:
    leaves = {"queries": rows(0, 40, 7), "values": rows(1, 40, 3), "keys": rows(2, 40, 7)}
    if is_self:
        del leaves["keys"]
    found = []
    for is_spread in (False, True):
        own = {}
        for name, leaf in leaves.items():
            # transposed, with gaps in both directions
            buffer = torch.full((3 * leaf.shape[1], 2 * leaf.shape[0]), math.nan, dtype=leaf.dtype)
            own[name] = buffer[1::3, 1::2].T.copy_(leaf) if is_spread and name in spread else leaf.clone()
            own[name].requires_grad_()
        result = gaussian_propagate(bandwidth=0.9, backend="cpu", workspace_bytes=20_000, **own)
        gradients = torch.autograd.grad((result * rows(3, 40, 3)).sum(), list(own.values()))
        found.append([result.detach(), *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bandwidth", [0.02, 0.1, 0.5, 5.0, math.inf])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_fp32_is_as_exact_as_its_digits_allow(bandwidth: float, offset: float) -> None:
    x = torch.nn.functional.normalize(rows(0, 300, 64), dim=1).float() + offset
    leaves = {"queries": x, "values": rows(1, 300, 9).sigmoid().float()}
    options: dict[str, object] = {"bandwidth": bandwidth}
    wide = both({name: leaf.double() for name, leaf in leaves.items()}, options, workspace_bytes=1 << 20)[0]
    narrow = both(leaves, options, workspace_bytes=200_000)[1]
    # an offset costs the input itself about four digits of a distance; a small bandwidth multiplies what is left
    tolerance = 3e-6 * (1 + offset) * max(1.0, (0.3 / bandwidth) ** 2)
    for exact, found in zip(wide, narrow, strict=True):
        scale = exact.abs().max().clamp_min(1e-3)
        assert ((found.double() - exact).abs().max() / scale).item() < tolerance


@pytest.mark.parametrize("one_bandwidth", [True, False])
def test_gradients_keep_their_digits_when_a_row_outweighs_its_neighbours(one_bandwidth: bool) -> None:
    # a weight of 1 on itself against 1e-10 on others: the pull of a row at itself must be nothing, not rounding noise
    x, values = torch.nn.functional.normalize(rows(0, 300, 512), dim=1), rows(1, 300, 9).sigmoid()
    bandwidth = torch.tensor(0.15).double() if one_bandwidth else torch.full((300,), 0.15).double()
    found = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "cpu")):
        leaf = x.to(dtype).requires_grad_()
        result = gaussian_propagate(leaf, values.to(dtype), bandwidth=bandwidth.to(dtype), backend=backend)
        found.append(torch.autograd.grad(result, leaf, rows(2, 300, 9, dtype=dtype))[0].double())
    exact, narrow = found
    assert ((narrow - exact).abs().max() / exact.abs().max()).item() < 5e-6


def test_far_rows_average_correctly_when_their_weights_underflow() -> None:
    x = torch.cat([rows(0, 20, 3), rows(1, 3, 3) + 12, rows(2, 1, 3) - 20]).float()
    leaves = {"queries": x, "values": rows(3, 24, 4).float(), "bandwidth": torch.tensor(0.3)}
    leaves["key_weights"] = rows(4, 24).abs().float()
    for bandwidth in (torch.tensor(0.3), torch.full((24,), 0.3)):
        exact_ones, found_ones = both(leaves | {"bandwidth": bandwidth}, {"exclude_self": True}, workspace_bytes=4000)
        assert exact_ones[0].min() < -1000
        assert torch.isfinite(exact_ones[0]).all()
        for exact, found in zip(exact_ones, found_ones, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3 * exact.abs().max().item())


def test_many_weights_too_small_for_fp32_count_beside_one_that_is_hardly_larger() -> None:
    # exp(-76) and 5,000 times exp(-87.2), each of them subnormal: together 7 % of the mass
    keys = torch.cat([torch.tensor([[-(152**0.5)]]), torch.full((5000, 1), 174.4**0.5)])
    values = (keys > 0).float()
    found, exact = (
        gaussian_propagate(torch.zeros(1, 1, dtype=dtype), values.to(dtype), keys=keys.to(dtype), **options)
        for dtype, options in (
            (torch.float32, {"bandwidth": 1.0, "backend": "cpu"}),
            (torch.float64, {"bandwidth": 1.0, "backend": "reference"}),
        )
    )
    assert 0.06 < exact.item() < 0.07
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("elsewhere", "is_nothing"), [(1.0, True), (2e-3, True), (5e-4, False), (1e-25, False)])
def test_far_keys_of_a_shard_are_nothing_only_beside_much_elsewhere(elsewhere: float, is_nothing: bool) -> None:
    queries, keys = torch.zeros(2, 1), torch.full((3, 1), 10.0)  # weights exp(-50): too small a sum to trust
    problem = Problem(queries, keys, torch.ones(3, 1), torch.ones(1), Pairs(), None, 1 << 20)
    problem = problem._replace(log_mass_elsewhere=torch.full((2,), math.log(elsewhere)))
    result, log_mass, _ = blocked.forward(problem)
    assert result[:, 0].tolist() == pytest.approx([0.0 if is_nothing else 1.0] * 2)
    assert log_mass.tolist() == pytest.approx([-math.inf if is_nothing else math.log(3) - 50] * 2)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_key_at_exactly_the_radius_counts(dtype: torch.dtype, backend: str) -> None:
    keys = torch.arange(4, dtype=dtype)[:, None]
    options = {"keys": keys, "bandwidth": 1e6, "backend": backend}
    for radius, shares in ((1.0, [1 / 2, 1 / 2, 0, 0]), (2.0, [1 / 3, 1 / 3, 1 / 3, 0]), (1.999, [1 / 2, 1 / 2, 0, 0])):
        found = gaussian_propagate(keys[:1].clone(), torch.eye(4, dtype=dtype), radius=radius, **options)
        torch.testing.assert_close(found, torch.tensor([shares], dtype=dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("one_bandwidth", [True, False])
@pytest.mark.parametrize("bandwidth", [1e-3, 1e-5])
def test_no_weight_exceeds_one_when_keys_repeat_the_queries(bandwidth: float, one_bandwidth: bool) -> None:
    # rounding makes some distances of 0 negative, and a narrow bandwidth would make those enormous weights
    x = torch.nn.functional.normalize(rows(0, 40, 64), dim=1).float()
    narrow = torch.full((1 if one_bandwidth else 40,), bandwidth).squeeze()
    mass = gaussian_mass(x, keys=x.clone(), bandwidth=narrow, backend="cpu")
    assert (mass <= 1e-6).all()
    result = gaussian_propagate(x, torch.eye(40), keys=x.clone(), bandwidth=narrow, backend="cpu")
    torch.testing.assert_close(result, torch.eye(40))


def test_half_inputs_and_mixed_dtypes_follow_the_reference() -> None:
    for dtype, values_dtype in ((torch.float16, torch.float16), (torch.bfloat16, torch.float32)):
        leaves = {"queries": rows(0, 30, 8, dtype=dtype), "values": rows(1, 40, 3, dtype=values_dtype)}
        leaves["keys"] = rows(2, 40, 8, dtype=dtype)
        found = both(leaves, {"bandwidth": 0.8}, workspace_bytes=3000)
        for exact, tiled in zip(*found, strict=True):
            assert tiled.dtype == exact.dtype
            torch.testing.assert_close(tiled.float(), exact.float(), rtol=1e-2, atol=1e-2)
    wide = gaussian_propagate(rows(0, 9, 2).float(), rows(1, 9, 2), bandwidth=1.0, backend="cpu")
    assert wide.dtype == torch.float64


@pytest.mark.parametrize("is_self", [True, False])
@pytest.mark.parametrize("one_bandwidth", [True, False])
def test_gradients_are_those_of_finite_differences(is_self: bool, one_bandwidth: bool) -> None:
    x, keys, values = rows(0, 5, 3).requires_grad_(), rows(1, 6, 3).requires_grad_(), rows(2, 5 if is_self else 6, 2)
    weights = (rows(3, 5 if is_self else 6).abs() + 0.1).requires_grad_()
    bandwidth = (torch.tensor(0.8).double() if one_bandwidth else torch.linspace(0.6, 1.4, 5).double()).requires_grad_()

    def propagate(x: Tensor, keys: Tensor, values: Tensor, bandwidth: Tensor, weights: Tensor) -> Tensor:
        options: dict[str, object] = {"exclude_self": True} if is_self else {"keys": keys}
        options |= {"bandwidth": bandwidth, "key_weights": weights, "backend": "cpu", "workspace_bytes": 500}
        return torch.cat([gaussian_propagate(x, values, **options), gaussian_mass(x, **options)[:, None]], 1)

    assert torch.autograd.gradcheck(propagate, (x, keys, values.requires_grad_(), bandwidth, weights))


def test_a_nan_query_spoils_its_own_row_only_and_a_nan_value_its_own_column() -> None:
    queries, keys, values = rows(0, 6, 3).float(), rows(1, 40, 3).float(), rows(2, 40, 2).float()
    expected = gaussian_propagate(queries, values, bandwidth=1.0, keys=keys, backend="cpu")
    spoilt = queries.clone()
    spoilt[1, 0] = math.nan
    result = gaussian_propagate(spoilt, values, bandwidth=1.0, keys=keys, backend="cpu", workspace_bytes=2000)
    assert result[1].isnan().all()
    torch.testing.assert_close(result[[0, 2, 3, 4, 5]], expected[[0, 2, 3, 4, 5]])
    values[3, 1] = math.nan
    result = gaussian_propagate(queries, values, bandwidth=1.0, keys=keys, backend="cpu")
    assert result[:, 1].isnan().all()
    torch.testing.assert_close(result[:, 0], expected[:, 0])


def test_repeated_runs_are_bitwise_equal() -> None:
    leaves = {"queries": rows(0, 700, 16).float(), "values": rows(1, 700, 5).float()}
    first, second = (both(leaves, {"bandwidth": 0.7}, workspace_bytes=1 << 20)[1] for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_call_within_inference_mode_leaves_later_ones_alone() -> None:
    program = (
        "import torch, scinet_kernels as k; x = torch.ones(4, 2); m = torch.inference_mode(); m.__enter__(); "
        "k.gaussian_propagate(x, x, bandwidth=1.0); m.__exit__(None, None, None); "
        "k.gaussian_propagate(x, x, bandwidth=1.0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("with_keys", [True, False])
def test_the_operator_obeys_torch_library(with_keys: bool) -> None:
    x, values = rows(0, 9, 4).requires_grad_(), rows(1, 9, 3).requires_grad_()
    keys = rows(2, 9, 4).requires_grad_() if with_keys else None
    bandwidth = torch.ones(1, dtype=torch.float64, requires_grad=True)
    offset = None if with_keys else 0
    arguments = (x, keys, values, bandwidth, None, None, None, offset, not with_keys, None, "cpu", 4000, "auto")
    torch.library.opcheck(torch.ops.scinet.gaussian, arguments)


def test_a_compiled_step_keeps_its_graph() -> None:
    x, values = rows(0, 9, 4).float().requires_grad_(), rows(1, 9, 3).float()

    def step(x: Tensor) -> Tensor:
        return gaussian_propagate(x, values, bandwidth=1.0, backend="cpu").sin()

    whole = torch.compile(step, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(whole, step(x))
    torch.testing.assert_close(torch.autograd.grad(whole.sum(), x), torch.autograd.grad(step(x).sum(), x))


def test_a_call_does_not_import_the_compiler() -> None:
    program = (
        "import sys, torch, scinet_kernels as k; x = torch.ones(4, 2, requires_grad=True); "
        "k.gaussian_propagate(x, x, bandwidth=1.0).sum().backward(); k.pearson(x.detach()); "
        "assert not {'torch._dynamo', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class _LargestOutput(TorchDispatchMode):
    """Remember the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return out


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("is_self", [True, False])
def test_no_temporary_grows_with_the_product_of_the_sizes(is_self: bool, backend: str) -> None:
    x, values = rows(0, 1000, 4).float().requires_grad_(), rows(1, 1000, 3).float().requires_grad_()
    options: dict[str, object] = {} if is_self else {"keys": x.detach().clone().requires_grad_()}
    with _LargestOutput() as mode:
        result = gaussian_propagate(x, values, bandwidth=0.5, backend=backend, workspace_bytes=100_000, **options)
        result.sum().backward()
    assert mode.largest <= 100_000  # 1000 x 1000 floats would be 4,000,000
