"""Gaussian propagation, mass and similarity against explicit float64 loops and their own invariants."""

import gc
import importlib
import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scinet_kernels import gaussian_mass, gaussian_propagate, gaussian_similarity, median_bandwidth, reference

MODEST = settings(deadline=None, max_examples=25)
SIZES = st.sampled_from([1, 2, 3, 5, 16, 17, 31])
SEEDS = st.integers(0, 2**31)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5}


def rows(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def oracle(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bandwidth: list[float],
    is_allowed: Callable[[int, int], bool] = lambda i, j: True,
    key_weights: list[float] | None = None,
    neighbours: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Propagate and log mass by loops over pairs, explicit differences, float64."""
    queries, keys, values = queries.double(), keys.double(), values.double()
    result = torch.zeros(len(queries), values.shape[1], dtype=torch.float64)
    mass = torch.full((len(queries),), -math.inf, dtype=torch.float64)
    for i, query in enumerate(queries):
        distance = [((query - key) ** 2).sum().item() for key in keys]
        chosen = sorted((d, j) for j, d in enumerate(distance) if is_allowed(i, j))[:neighbours]
        if not chosen:
            continue
        logits = torch.tensor([-d / (2 * bandwidth[i] ** 2) for d, _ in chosen], dtype=torch.float64)
        if key_weights is not None:
            logits = logits + torch.tensor([key_weights[j] for _, j in chosen], dtype=torch.float64).log()
        mass[i] = logits.logsumexp(0)
        result[i] = (logits - mass[i]).exp() @ values[[j for _, j in chosen]]
    return result, mass


@given(b=SIZES, m=SIZES, d=SIZES, c=SIZES, seed=SEEDS, dtype=st.sampled_from([torch.float64, torch.float32]))
@MODEST
def test_propagate_and_mass_equal_the_loop_when_keys_are_given(
    b: int, m: int, d: int, c: int, seed: int, dtype: torch.dtype
) -> None:
    queries, keys, values = rows(seed, b, d, dtype=dtype), rows(seed + 1, m, d, dtype=dtype), rows(seed + 2, m, c)
    values = values.to(dtype)
    bandwidth = torch.linspace(0.5, 2, b, dtype=dtype)
    weights = torch.linspace(0.1, 3, m, dtype=dtype)
    ids = torch.arange(b) % 4, torch.arange(m) % 4
    options = {"bandwidth": bandwidth, "keys": keys, "query_ids": ids[0], "key_ids": ids[1], "key_weights": weights}
    expected, expected_mass = oracle(
        queries, keys, values, bandwidth.tolist(), lambda i, j: i % 4 != j % 4, weights.tolist()
    )
    actual = gaussian_propagate(queries, values, **options)
    assert actual.dtype == dtype
    tolerance = TOLERANCE[dtype] * max(1, d)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    mass = gaussian_mass(queries, **options)
    torch.testing.assert_close(mass.double(), expected_mass, rtol=tolerance, atol=tolerance)


@given(b=SIZES, d=SIZES, seed=SEEDS, radius=st.floats(0.5, 4), neighbours=st.integers(1, 6), exclude=st.booleans())
@MODEST
def test_propagate_equals_the_loop_when_radius_neighbours_and_self_limit_the_pairs(
    b: int, d: int, seed: int, radius: float, neighbours: int, exclude: bool
) -> None:
    x, values = rows(seed, b, d), rows(seed + 1, b, 3)

    def is_allowed(i: int, j: int) -> bool:
        return (x[i] - x[j]).norm().item() <= radius and not (exclude and i == j)

    expected, _ = oracle(x, x, values, [0.7] * b, is_allowed, neighbours=neighbours)
    actual = gaussian_propagate(x, values, bandwidth=0.7, exclude_self=exclude, radius=radius, neighbours=neighbours)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@given(b=SIZES, d=SIZES, seed=SEEDS, bandwidth=st.floats(0.05, 10))
@MODEST
def test_rows_are_convex_when_values_vary_and_one_when_values_are_one(
    b: int, d: int, seed: int, bandwidth: float
) -> None:
    x, values = rows(seed, b, d), rows(seed + 1, b, 4)
    ones = gaussian_propagate(x, torch.ones(b, 1, dtype=torch.float64), bandwidth=bandwidth)
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=1e-14)
    mixed = gaussian_propagate(x, values, bandwidth=bandwidth)
    assert (mixed <= values.max(0).values + 1e-12).all()
    assert (mixed >= values.min(0).values - 1e-12).all()


@given(b=SIZES, d=SIZES, seed=SEEDS, offset=st.floats(-100, 100), scale=st.floats(0.01, 100))
@MODEST
def test_propagate_is_unchanged_when_rows_move_scale_or_swap(
    b: int, d: int, seed: int, offset: float, scale: float
) -> None:
    x, values = rows(seed, b, d), rows(seed + 1, b, 4)
    base = gaussian_propagate(x, values, bandwidth=0.5)
    moved = gaussian_propagate((x + offset) * scale, values, bandwidth=0.5 * scale)
    torch.testing.assert_close(moved, base, rtol=1e-8, atol=1e-8)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(gaussian_propagate(x[order], values[order], bandwidth=0.5), base[order])
    rotation = torch.linalg.qr(rows(seed + 2, d, d)).Q
    torch.testing.assert_close(gaussian_propagate(x @ rotation, values, bandwidth=0.5), base)


def test_fp32_keeps_its_digits_when_rows_lie_far_from_the_origin() -> None:
    x, values = rows(0, 40, 8, dtype=torch.float32), rows(1, 40, 3, dtype=torch.float32)
    x = (x * 64).round() / 64 + 1024  # exactly representable, so only the computation can lose digits
    expected, _ = oracle(x, x, values, [0.5] * 40)
    torch.testing.assert_close(gaussian_propagate(x, values, bandwidth=0.5).double(), expected, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize(
    ("backend", "bandwidth"), [("cpu", 1e-3), ("cpu", 1e-15), ("reference", 1e-3), ("reference", 1e-25)]
)
def test_a_row_has_weight_one_on_itself_when_the_bandwidth_is_tiny(backend: str, bandwidth: float) -> None:
    x = rows(0, 8, 512, dtype=torch.float32) + 3
    assert (gaussian_mass(x, bandwidth=bandwidth, backend=backend) == 0).all()
    values = rows(1, 8, 3, dtype=torch.float32)
    torch.testing.assert_close(gaussian_propagate(x, values, bandwidth=bandwidth, backend=backend), values)


def test_centre_lies_amid_the_keys_in_few_digits() -> None:
    keys = rows(0, 50, 6, dtype=torch.float32) * torch.logspace(-3, 3, 6) + 0.7
    centre = reference.centre_of(keys, torch.float32)
    assert ((centre - keys.mean(0)).abs() <= keys.mean(0).abs() / 64).all()
    digits = torch.frexp(centre).mantissa * 64
    assert (digits == digits.round()).all()  # so that subtracting it from points on a grid leaves ties as they are
    keys[3, 2], keys[4, 5] = math.nan, math.inf
    assert reference.centre_of(keys, torch.float32)[[2, 5]].tolist() == [0.0, 0.0]


def test_nan_stays_in_its_row_when_a_query_holds_it() -> None:
    queries, keys, values = rows(0, 4, 3), rows(1, 5, 3), rows(2, 5, 2)
    expected = gaussian_propagate(queries, values, bandwidth=1.0, keys=keys)
    queries[1, 0] = math.nan
    result = gaussian_propagate(queries, values, bandwidth=1.0, keys=keys)
    assert result[1].isnan().all()
    torch.testing.assert_close(result[[0, 2, 3]], expected[[0, 2, 3]])


def test_bandwidth_limits_give_the_column_mean_and_the_values() -> None:
    x, values = rows(0, 9, 4), rows(1, 9, 3)
    for wide in (1e9, math.inf):
        torch.testing.assert_close(gaussian_propagate(x, values, bandwidth=wide), values.mean(0).expand(9, 3))
    torch.testing.assert_close(gaussian_propagate(x, values, bandwidth=1e-6), values)
    scalar = gaussian_propagate(x, values, bandwidth=torch.tensor(0.4))
    torch.testing.assert_close(scalar, gaussian_propagate(x, values, bandwidth=torch.full((9,), 0.4)))


@pytest.mark.parametrize("exclusion", ["ids", "self", "weights", "radius"])
def test_rows_are_zero_with_zero_gradient_when_no_neighbour_is_left(exclusion: str) -> None:
    x = torch.tensor([[0.0, 0], [1, 0], [9, 9]], dtype=torch.float64, requires_grad=True)
    values = rows(1, 3, 2).requires_grad_()
    bandwidth = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    options: dict[str, dict[str, object]] = {
        "ids": {"query_ids": torch.tensor([4, 4, 4])},
        "self": {"exclude_self": True, "query_ids": torch.tensor([7, 7, 7])},
        "weights": {"key_weights": torch.zeros(3, dtype=torch.float64, requires_grad=True)},
        "radius": {"exclude_self": True, "radius": 0.5},
    }
    result = gaussian_propagate(x, values, bandwidth=bandwidth, **options[exclusion])
    mass = gaussian_mass(x, bandwidth=bandwidth, **options[exclusion])
    assert (result == 0).all()
    assert (mass == -math.inf).all()
    (result.sum() + mass.masked_fill(mass == -math.inf, 0).sum()).backward()
    for tensor in (x, values, bandwidth, options[exclusion].get("key_weights")):
        if isinstance(tensor, Tensor) and tensor.grad is not None:
            assert (tensor.grad == 0).all()


def test_one_empty_row_leaves_the_others_alone() -> None:
    x, values = rows(0, 4, 2).requires_grad_(), rows(1, 4, 2)
    ids = torch.tensor([0, 0, 1, 1])
    keys = x.detach()[:2]
    result = gaussian_propagate(x, values[:2], bandwidth=1.0, keys=keys, query_ids=ids, key_ids=torch.tensor([0, 0]))
    assert (result[:2] == 0).all()
    torch.testing.assert_close(result[2:], gaussian_propagate(x[2:], values[:2], bandwidth=1.0, keys=keys))
    result.square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert (x.grad[:2] == 0).all()
    assert (x.grad[2:] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_points_still_average_when_every_weight_underflows(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0], [100.0], [201.0]], dtype=dtype, requires_grad=True)
    values = torch.eye(3, dtype=dtype)
    result = gaussian_propagate(x, values, bandwidth=0.5, exclude_self=True)
    torch.testing.assert_close(result, torch.tensor([[0, 1, 0], [1, 0, 0], [0, 1, 0]], dtype=dtype))
    mass = gaussian_mass(x, bandwidth=0.5, exclude_self=True)
    torch.testing.assert_close(mass, torch.tensor([-20000.0, -20000.0, -20402.0], dtype=dtype))
    (result * torch.arange(3)).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_fp32(dtype: torch.dtype) -> None:
    x, values = rows(0, 20, 6, dtype=dtype), rows(1, 20, 3, dtype=dtype)
    result = gaussian_propagate(x, values, bandwidth=0.5)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, gaussian_propagate(x.float(), values.float(), bandwidth=0.5), rtol=0, atol=0)
    assert gaussian_mass(x, bandwidth=0.5).dtype == torch.float32
    assert gaussian_similarity(x, x, bandwidth=0.5).dtype == torch.float32
    assert gaussian_propagate(x, values.double(), bandwidth=0.5).dtype == torch.float64
    assert gaussian_propagate(x.double(), values, bandwidth=0.5).dtype == torch.float32


def test_autocast_changes_nothing() -> None:
    x, values = rows(0, 20, 6, dtype=torch.float32), rows(1, 20, 3, dtype=torch.float32)

    gradients = []
    for is_on in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
            loss = gaussian_propagate(leaf, values, bandwidth=0.5, workspace_bytes=1).square().sum()
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    assert torch.equal(*gradients)


@given(b=st.integers(0, 40), m=st.integers(0, 9), seed=SEEDS, workspace=st.integers(1, 20000))
@MODEST
def test_result_and_gradient_do_not_depend_on_the_workspace(b: int, m: int, seed: int, workspace: int) -> None:
    results = []
    for size in (workspace, 64 << 20):
        x, keys, values = (t.requires_grad_() for t in (rows(seed, b, 3), rows(seed + 1, m, 3), rows(seed + 2, m, 2)))
        ids = torch.arange(b) % 3, torch.arange(m) % 3
        out = gaussian_propagate(
            x,
            values,
            bandwidth=torch.linspace(0.5, 2, b),
            keys=keys,
            query_ids=ids[0],
            key_ids=ids[1],
            neighbours=3,
            workspace_bytes=size,
        )
        assert out.shape == (b, 2)
        gradients = torch.autograd.grad(out.square().sum(), (x, keys, values), allow_unused=True)
        results.append((out, *(torch.zeros(()) if g is None else g for g in gradients)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("workspace", [1, 1 << 20])
@pytest.mark.parametrize("is_self", [True, False])
@pytest.mark.parametrize("neighbours", [None, 3])
def test_gradients_are_right(workspace: int, is_self: bool, neighbours: int | None) -> None:
    x, keys, weights = (t.requires_grad_() for t in (rows(0, 5, 3), rows(1, 6, 3), rows(3, 6).abs() + 0.1))
    values = rows(2, 5 if is_self else 6, 2).requires_grad_()
    bandwidth = torch.linspace(0.6, 1.4, 5, dtype=torch.float64, requires_grad=True)

    def propagate(x: Tensor, keys: Tensor, values: Tensor, bandwidth: Tensor, weights: Tensor) -> Tensor:
        options = {"exclude_self": True} if is_self else {"keys": keys, "key_weights": weights}
        return gaussian_propagate(
            x, values, bandwidth=bandwidth, neighbours=neighbours, workspace_bytes=workspace, **options
        )

    assert torch.autograd.gradcheck(propagate, (x, keys, values, bandwidth, weights))
    assert torch.autograd.gradcheck(
        lambda x, keys, s: gaussian_mass(x, keys=keys, bandwidth=s, workspace_bytes=workspace), (x, keys, bandwidth)
    )
    assert torch.autograd.gradcheck(lambda x, keys, s: gaussian_similarity(x, keys, bandwidth=s), (x, keys, bandwidth))


@given(b=st.integers(2, 20), d=SIZES, seed=SEEDS, bandwidth=st.floats(0.2, 3))
@MODEST
def test_gradients_obey_translation_and_euler(b: int, d: int, seed: int, bandwidth: float) -> None:
    x, s = rows(seed, b, d).requires_grad_(), torch.tensor(bandwidth, dtype=torch.float64, requires_grad=True)
    loss = (gaussian_propagate(x, rows(seed + 1, b, 3), bandwidth=s) * rows(seed + 2, b, 3)).sum()
    dx, ds = torch.autograd.grad(loss, (x, s))
    torch.testing.assert_close(dx.sum(0), torch.zeros(d, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(ds, -(x * dx).sum() / s, rtol=1e-8, atol=1e-8)


def test_second_derivative_is_right() -> None:
    x, values = rows(0, 4, 2).requires_grad_(), rows(1, 4, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, v: gaussian_propagate(x, v, bandwidth=0.8), (x, values))


@pytest.mark.parametrize(("b", "m"), [(0, 3), (3, 0), (0, 0)])
def test_empty_sides_work(b: int, m: int) -> None:
    x, values = rows(0, b, 4).requires_grad_(), rows(2, m, 2)
    result = gaussian_propagate(x, values, bandwidth=1.0, keys=rows(1, m, 4))
    assert result.shape == (b, 2)
    result.sum().backward()
    assert x.grad is not None
    assert (x.grad == 0).all()
    assert (gaussian_mass(x, bandwidth=1.0, keys=rows(1, m, 4)) == -math.inf).all()
    assert gaussian_similarity(x, rows(1, m, 4), bandwidth=1.0).shape == (b, m)


def test_similarity_equals_its_formula() -> None:
    x, y = rows(0, 6, 3), rows(1, 5, 3)
    expected = torch.exp(-(x[:, None] - y[None]).square().sum(2) / (2 * 0.7**2))
    torch.testing.assert_close(gaussian_similarity(x, y, bandwidth=0.7), expected)


def test_median_bandwidth_is_the_median_distance_whatever_the_row_order() -> None:
    x = rows(0, 30, 3)
    distances = sorted((x[i] - x[j]).norm().item() for i in range(30) for j in range(i))
    assert median_bandwidth(x).item() == pytest.approx(distances[(len(distances) - 1) // 2])
    assert median_bandwidth(x.flip(0)).item() == pytest.approx(median_bandwidth(x).item())
    draws = [median_bandwidth(x, sample=10, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert median_bandwidth(x, sample=10) == median_bandwidth(x[::3])
    assert median_bandwidth(torch.zeros(4, 2)) > 0
    with pytest.raises(ValueError, match="at least 2 rows"):
        median_bandwidth(x[:1])


def _propagate_on_rank(rank: int, address: str) -> None:
    """One of two processes: sharded results and gradients equal those of one process with all rows."""
    torch.set_num_threads(1)
    # torch.utils.checkpoint imports this on first use. Imported while a group exists, it keeps that group, whose
    # threads then outlive destroy_process_group and now and then abort the process at exit.
    importlib.import_module("torch._dynamo")
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    for counts in ([5, 2], [0, 4]):
        _compare_with_one_process(rank, counts)
    x, values = rows(0, 3, 2), rows(1, 3, 2)
    with pytest.raises(ValueError, match="ranks disagree"):
        gaussian_propagate(x, values[:, : 1 + rank], bandwidth=0.8, group=dist.group.WORLD)
    gc.collect()  # so that the group dies here and joins its threads, not while the interpreter shuts down
    dist.destroy_process_group()


def _compare_with_one_process(rank: int, counts: list[int]) -> None:
    group, total = dist.group.WORLD, sum(counts)
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    x, values, bank = rows(0, total, 3), rows(1, total, 2), rows(2, total, 3)
    ids, signal = torch.arange(total) // 2, rows(3, total, 2)
    for use_bank in (False, True):
        whole = [t.clone().requires_grad_() for t in (x, values, bank)]
        part = [t[own].clone().requires_grad_() for t in (x, values, bank)]
        results = []
        for (q, v, k), chosen, where in ((whole, slice(None), None), (part, own, group)):
            options = {"keys": k, "key_ids": ids[chosen]} if use_bank else {}
            out = gaussian_propagate(
                q, v, bandwidth=0.8, query_ids=ids[chosen], workspace_bytes=200, group=where, **options
            )
            (out * signal[chosen]).sum().backward()
            results.append(out)
        torch.testing.assert_close(results[1], results[0][own])
        for mine, all_rows in zip(part[: 2 + use_bank], whole, strict=False):
            assert mine.grad is not None
            assert all_rows.grad is not None
            torch.testing.assert_close(mine.grad, all_rows.grad[own])
    lone = gaussian_mass(x[own], bandwidth=0.8, exclude_self=True, group=group)
    torch.testing.assert_close(lone, gaussian_mass(x, bandwidth=0.8, exclude_self=True)[own])


@pytest.mark.multiprocess
def test_sharded_rows_equal_one_process_when_ranks_hold_uneven_rows(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    address = str(tmp_path_factory.mktemp("gloo") / "store")
    mp.spawn(_propagate_on_rank, args=(address,), nprocs=2)
