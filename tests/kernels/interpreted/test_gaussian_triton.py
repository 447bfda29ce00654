"""The Gaussian Triton kernels against the float64 reference: shapes, strides, masks, extremes, gradients."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from scinet_kernels import gaussian_mass, gaussian_propagate
from tests.kernels.interpreted.conftest import DEVICE, amid_infinities

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("small_tiles")]
# what numpy says of inf - inf, where a read past an edge is masked out of the result
WITHIN_BOUNDS = pytest.mark.filterwarnings("error::RuntimeWarning")
MODEST = settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
SIZES = st.sampled_from([0, 1, 2, 15, 16, 17, 31, 33])
WIDTHS = st.sampled_from([1, 3, 16, 17, 33])
SEEDS = st.integers(0, 2**31)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(
    leaves: dict[str, Tensor], options: dict[str, object], *, dtype: torch.dtype, transposed: bool | set[str]
) -> None:
    """Result, mass and gradients of the kernels equal those of the reference on the same (rounded) numbers."""
    rounded = {name: leaf.to(dtype if leaf.dim() == 2 else torch.float32) for name, leaf in leaves.items()}
    found = []
    for backend in ("reference", "triton"):
        own: dict[str, Tensor] = {}
        for margin, (name, leaf) in enumerate(rounded.items(), start=20):
            ready = leaf.double()
            if backend == "triton" and leaf.dim() == 2:
                flipped = name in transposed if isinstance(transposed, set) else transposed
                ready = amid_infinities(leaf, margin=margin, transposed=flipped).to(DEVICE)
            elif backend == "triton":
                ready = leaf.clone().to(DEVICE)
            own[name] = ready.detach().requires_grad_()
        device = own["queries"].device
        arguments: dict[str, object] = {k: v for k, v in own.items() if k not in ("queries", "values")}
        arguments |= {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
        # a workspace of a few rows, so that the backward takes several panels
        arguments |= {"backend": backend, "workspace_bytes": 2_000}
        result = gaussian_propagate(own["queries"], own["values"], **arguments)
        mass = gaussian_mass(own["queries"], **arguments)
        assert result.dtype == (torch.float64 if backend == "reference" else torch.float32)
        loss = (mass.masked_fill(mass == -math.inf, 0) * rows(7, len(mass)).to(mass)).sum()
        loss = loss + (result * rows(8, *result.shape).to(result)).sum()
        gradients = torch.autograd.grad(loss, list(own.values()), allow_unused=True, materialize_grads=True)
        found.append([t.detach().double().cpu() for t in (result, mass, *gradients)])
    for exact, kernel in zip(*found, strict=True):
        scale = max(1.0, exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0)
        torch.testing.assert_close(kernel, exact, rtol=0, atol=TOLERANCE[dtype] * scale)


@given(
    b=SIZES, m=SIZES, d=WIDTHS, c=WIDTHS, seed=SEEDS, dtype=st.sampled_from([torch.float32, torch.float16]),
    transposed=st.booleans(), has_ids=st.booleans(), has_weights=st.booleans(), has_radius=st.booleans(),
    one_bandwidth=st.booleans(),
)  # fmt: skip
@MODEST
@WITHIN_BOUNDS
def test_cross_form_equals_the_reference(
    b: int, m: int, d: int, c: int, seed: int, dtype: torch.dtype, transposed: bool, has_ids: bool, has_weights: bool,
    has_radius: bool, one_bandwidth: bool,
) -> None:  # fmt: skip
    leaves = {
        "queries": rows(seed, b, d) / d**0.5,
        "values": rows(seed + 1, m, c),
        "keys": rows(seed + 2, m, d) / d**0.5,
    }
    leaves["bandwidth"] = rows(seed + 3).abs() + 0.5 if one_bandwidth else rows(seed + 3, b).abs() + 0.5
    options: dict[str, object] = {}
    if has_weights:
        leaves["key_weights"] = rows(seed + 4, m)  # about half are negative: those keys do not count
    if has_ids:
        # ids that differ in the upper half alone are not equal
        options |= {"query_ids": torch.arange(b) % 4, "key_ids": torch.arange(m) % 3 + torch.arange(m) % 2 * 2**40}
    if has_radius:
        options["radius"] = 1.31
    compare(leaves, options, dtype=dtype, transposed=transposed)


@given(
    b=SIZES, d=WIDTHS, c=WIDTHS, seed=SEEDS, transposed=st.booleans(), exclude=st.booleans(), has_ids=st.booleans(),
    one_bandwidth=st.booleans(),
)  # fmt: skip
@MODEST
@WITHIN_BOUNDS
def test_self_form_equals_the_reference(
    b: int, d: int, c: int, seed: int, transposed: bool, exclude: bool, has_ids: bool, one_bandwidth: bool
) -> None:
    leaves = {"queries": rows(seed, b, d) / d**0.5, "values": rows(seed + 1, b, c)}
    leaves["bandwidth"] = rows(seed + 3).abs() + 0.5 if one_bandwidth else rows(seed + 3, b).abs() + 0.5
    options: dict[str, object] = {"exclude_self": exclude}
    if has_ids:
        options["query_ids"] = torch.arange(b) // 2
    compare(leaves, options, dtype=torch.float32, transposed=transposed)


@pytest.mark.parametrize("transposed", [set(), {"queries"}, {"keys"}, {"values"}], ids=str)
@WITHIN_BOUNDS
def test_every_stride_is_its_own(transposed: set[str]) -> None:
    # half precision: fp32 rows are copied to be centred, and lose their strides
    leaves = {"queries": rows(0, 17, 18) / 4, "values": rows(1, 33, 3), "keys": rows(2, 33, 18) / 4}
    leaves["bandwidth"] = torch.tensor(1.0)
    compare(leaves, {}, dtype=torch.float16, transposed=transposed)


def test_far_rows_average_correctly_and_duplicates_share() -> None:
    x = torch.cat([rows(0, 12, 3), rows(1, 3, 3) + 12, rows(2, 1, 3) - 20, rows(3, 1, 3).expand(4, 3)])
    leaves = {"queries": x, "values": rows(4, len(x), 4), "bandwidth": torch.tensor(0.5).double()}
    for exclude in (True, False):
        found = []
        for backend in ("reference", "triton"):
            wide = {k: v.clone() if backend == "reference" else v.float().to(DEVICE) for k, v in leaves.items()}
            options = {"bandwidth": wide["bandwidth"], "exclude_self": exclude, "backend": backend}
            found.append(gaussian_propagate(wide["queries"], wide["values"], **options).double().cpu())
        torch.testing.assert_close(found[1], found[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("left_out_by", ["exclude_self", "query_ids", "key_weights"])
def test_far_rows_average_correctly_when_their_own_row_does_not_count(left_out_by: str) -> None:
    # weights of e-200 and less, whose plain sum would be nothing: the largest exponent must be subtracted first
    x, values = 20 * torch.arange(20.0)[:, None], rows(0, 20, 3).float()
    weights = torch.where(torch.arange(20) % 2 == 0, 0.0, 1.0)
    rules = {"exclude_self": True, "query_ids": torch.arange(20).to(DEVICE), "key_weights": weights.to(DEVICE)}
    options = {"bandwidth": 1.0, "backend": "triton", left_out_by: rules[left_out_by]}
    found = gaussian_propagate(x.to(DEVICE), values.to(DEVICE), **options).double().cpu()
    mass = gaussian_mass(x.to(DEVICE), **options).double().cpu()
    wide = {name: rule.double().cpu() if name == "key_weights" else rule for name, rule in rules.items()}
    options |= {"backend": "reference", left_out_by: wide[left_out_by]}
    torch.testing.assert_close(found, gaussian_propagate(x.double(), values.double(), **options), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mass, gaussian_mass(x.double(), **options), rtol=1e-5, atol=1e-5)


def test_key_at_exactly_the_radius_counts() -> None:
    keys = torch.arange(4.0, device=DEVICE)[:, None]
    options = {"keys": keys, "bandwidth": 1e6, "radius": 2.0, "backend": "triton"}
    found = gaussian_propagate(keys[:1].clone(), torch.eye(4, device=DEVICE), **options).cpu()
    torch.testing.assert_close(found, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0]]), rtol=1e-5, atol=1e-5)


def test_a_row_has_weight_one_on_itself_when_the_bandwidth_is_tiny() -> None:
    x = (rows(0, 20, 64) + 3).float().to(DEVICE)
    assert (gaussian_mass(x, bandwidth=1e-3, backend="triton") == 0).all()


def test_gradients_keep_their_digits_when_a_row_outweighs_its_neighbours() -> None:
    x, values = torch.nn.functional.normalize(rows(0, 40, 128), dim=1), rows(1, 40, 3).sigmoid()
    found = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "triton")):
        leaf, given = (tensor.to(dtype).to("cpu" if dtype == torch.float64 else DEVICE) for tensor in (x, values))
        leaf.requires_grad_()
        result = gaussian_propagate(leaf, given, bandwidth=0.15, backend=backend)
        signal = rows(2, 40, 3).to(result)
        found.append(torch.autograd.grad(result, leaf, signal)[0].double().cpu())
    exact, narrow = found
    assert ((narrow - exact).abs().max() / exact.abs().max()).item() < 1e-5


def test_a_nan_query_spoils_its_own_row_only() -> None:
    queries, keys, values = (rows(seed, 20, 5).float().to(DEVICE) for seed in range(3))
    expected = gaussian_propagate(queries, values, bandwidth=1.0, keys=keys, backend="triton")
    queries[17, 2] = math.nan
    result = gaussian_propagate(queries, values, bandwidth=1.0, keys=keys, backend="triton")
    is_spoilt = torch.arange(20) == 17
    assert result[is_spoilt].isnan().all()
    torch.testing.assert_close(result[~is_spoilt], expected[~is_spoilt])


def test_row_offsets_do_not_overflow_when_rows_lie_more_than_32_bits_apart() -> None:
    points, values = rows(0, 3, 4).half().to(DEVICE), rows(1, 3, 2).half().to(DEVICE)
    # 4 GiB of addresses, of which a few pages are touched; half precision, since fp32 rows are copied to be centred
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    far = torch.as_strided(storage, (3, 4), (2**30, 1))
    far.copy_(points)
    expected = gaussian_propagate(points, values, bandwidth=1.0, backend="triton")
    assert torch.equal(gaussian_propagate(far, values, bandwidth=1.0, backend="triton"), expected)
