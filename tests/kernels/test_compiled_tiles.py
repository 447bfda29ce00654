"""The tiles in C at the sizes that are shipped: against the reference, at any number of threads, in bounded memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from scinet_kernels import bench, compiled_tiles, gaussian_mass, gaussian_propagate
from scinet_kernels.reference import Pairs
from scinet_kernels.tiling import Problem


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def results(
    b: int,
    m: int | None,
    dtype: torch.dtype,
    *,
    backend: str = "cpu",
    workspace_bytes: int = 64 << 20,
    **options: object,
) -> list[Tensor]:
    """Result, mass and gradients of unit vectors; `m` keys, or the queries themselves."""
    leaves = {"queries": torch.nn.functional.normalize(rows(0, b, 24), dim=1), "values": rows(1, m or b, 5)}
    if m:
        leaves["keys"] = torch.nn.functional.normalize(rows(2, m, 24), dim=1)
    own = {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}
    arguments = {"bandwidth": 0.4, "backend": backend, "workspace_bytes": workspace_bytes} | options
    keys = {"keys": own["keys"]} if m else {}
    result = gaussian_propagate(own["queries"], own["values"], **keys, **arguments)
    mass = gaussian_mass(own["queries"], **keys, **arguments)
    loss = (result * rows(3, *result.shape).to(dtype)).sum() + (mass * rows(4, b).to(dtype)).sum()
    return [result.detach(), mass.detach(), *torch.autograd.grad(loss, list(own.values()))]


# Around the sizes at which the tiles change, and not multiples of them.
@pytest.mark.parametrize(("b", "m"), [(65, None), (511, None), (600, None), (2049, None), (70, 4097), (700, 300)])
@pytest.mark.parametrize("workspace_bytes", [64 << 20, 200_000])
def test_shipped_tiles_equal_the_reference(b: int, m: int | None, workspace_bytes: int) -> None:
    exact = results(b, m, torch.float64, backend="reference")
    found = results(b, m, torch.float32, workspace_bytes=workspace_bytes)
    for one, other in zip(exact, found, strict=True):
        assert ((other.double() - one).abs().max() / one.abs().max()).item() < 3e-6


@pytest.mark.parametrize("m", [None, 1300])
def test_the_number_of_threads_changes_no_bit(m: int | None) -> None:
    options = {"exclude_self": True} if m is None else {"radius": 1.3}
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(results(900, m, torch.float32, **options))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("workspace_bytes", [1, 5000, 200_000, 64 << 20])
@pytest.mark.parametrize("b", [1, 300, 5000])
@pytest.mark.parametrize("is_self", [True, False])
def test_the_workspace_holds_to_its_bound(workspace_bytes: int, b: int, is_self: bool) -> None:
    points = torch.zeros(b, 8)
    keys = points if is_self else torch.zeros(70_000, 8)
    problem = Problem(points, keys, None, torch.ones(1), Pairs(), None, workspace_bytes)
    with threads(4):
        blocks = compiled_tiles.blocks_of(problem, num_tiles=2)
    smallest = 2 + 2 * 9  # two tiles of one cell, two packed rows: no less can work
    assert blocks.workspace <= max(smallest, workspace_bytes // 4)
    assert 1 <= blocks.threads <= 4
    assert blocks.packed % blocks.rows == blocks.packed % blocks.columns == 0


def test_memory_stays_far_below_the_matrix_as_seen_from_outside() -> None:
    setting = bench.Setting("propagate", 8192, 64, 16, 1, True, "cpu")
    grown = bench._memory("ours (cpu)", setting)
    assert grown is not None
    assert grown < 64  # MiB; one 8,192 x 8,192 matrix takes 256


def weight_of(exponents: Tensor) -> tuple[Tensor, Tensor]:
    """The weight [B] in fp32 of a key at each exponent -> (as found, exponents as fp32 knows them), both float64.

    Each query's own point has value 0 and weight 1, the key value 1; a third key, which does not count, brings the mean
    of the values to 0, so that the result is the weight's share and nothing is lost against a mean.
    """
    keys, values = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [-1.0]])
    bandwidth = (-2 * exponents).rsqrt()
    options = {"keys": keys, "key_weights": torch.tensor([1.0, 1.0, 0.0]), "backend": "cpu"}
    share = gaussian_propagate(torch.zeros(len(exponents), 1), values, bandwidth=bandwidth, **options)[:, 0].double()
    inverse = bandwidth.reciprocal()
    return share / (1 - share), (-0.5 * inverse * inverse).double()


def test_weights_keep_two_units_in_the_last_place_down_to_where_they_would_be_subnormal() -> None:
    found, exponents = weight_of(-torch.linspace(0.01, 86.99, 16_384))
    error = found / exponents.exp() - 1
    assert error.abs().max() <= 2 * 2**-23
    # rounding scatters and cancels in the mean; an error of the series does not: by where the exponent lies between
    # two powers of 2
    position = exponents / math.log(2)
    position = ((position - position.floor()) * 16).long()
    for part in range(16):
        assert error[position == part].mean().abs() < 1.2e-8


def test_weights_that_would_be_subnormal_are_nothing() -> None:
    found, _ = weight_of(torch.tensor([-86.9, -87.1, -88.4, -95.0, -103.0, -1e4, -1e30]))
    assert found[0].item() == pytest.approx(math.exp(-86.9), rel=1e-4, abs=0)
    assert (found[1:] == 0).all()
