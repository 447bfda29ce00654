"""Keys that go round the ranks, against one process that holds all rows and against the gather."""

import gc
import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scinet_kernels import blocked, dispatch, gaussian_mass, gaussian_propagate, ring

# group ranks are not global ranks in three of them; row counts of each rank, for each group size
GROUPS = [[1], [3, 2], [1, 2, 3], [0, 1, 2, 3]]
COUNTS = {1: [[6]], 2: [[5, 3], [0, 4]], 3: [[3, 4, 2], [4, 0, 3]], 4: [[4, 1, 3, 5], [0, 3, 0, 2]]}
ROW_BYTES = 8 * (3 + 2 + 1 + 1)  # what `Case` gives a key: 3 columns, 2 values, a weight, an id


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case(NamedTuple):
    """Options of one comparison; keys are "self", "same" (the queries, passed as keys) or "bank" (others)."""

    keys: str
    one_bandwidth: bool = True
    has_ids: bool = False
    has_weights: bool = False
    exclude_self: bool = False
    radius: float | None = None
    bandwidth: float = 0.8
    apart: float = 0.0  # how far the ranks' keys lie from each other
    far: float = 0.0  # how far the next rank's keys lie from the queries
    heavier: float = 3.0  # decimal places between the ranks' weights

    def operands(self, counts: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what is differentiated, and ids, of all rows."""
        total, rank_of = sum(counts), torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        leaves = {"queries": rows(0, total, 3), "values": rows(1, total, 2) + 3}
        if self.keys == "bank":
            leaves["keys"] = rows(2, total, 3)
        if self.keys == "bank":
            leaves["keys"][:, 0] += self.apart * rank_of
            leaves["queries"][:, 0] += self.apart * ((rank_of + 1) % len(counts)) + self.far
        else:
            leaves["queries"][:, 0] += self.apart * rank_of
        shape = () if self.one_bandwidth else (total,)
        leaves["bandwidth"] = self.bandwidth * (1 + 0.2 * rows(3, *shape).tanh())
        if self.has_weights:  # the ranks' largest differ by much; some are negative: those keys do not count
            leaves["key_weights"] = (rows(4, total) + 0.7) * 10.0 ** (self.heavier * rank_of.double())
        ids = {}
        if self.has_ids:  # the first query meets its own id everywhere
            ids["query_ids"] = torch.arange(total) // 2
            ids["key_ids"] = torch.arange(total) % 3
            if self.keys == "bank":
                ids["key_ids"][:] = torch.where(rows(5, total) > 0, 0, ids["key_ids"])
        if self.keys == "self":
            ids.pop("key_ids", None)
        return leaves, ids


CASES = [
    Case("self"),
    Case("self", has_ids=True),
    Case("self", exclude_self=True, has_weights=True),
    Case("self", one_bandwidth=False, exclude_self=True, has_ids=True, has_weights=True, radius=2.5),
    Case("same"),
    Case("same", one_bandwidth=False, has_ids=True, has_weights=True),
    Case("bank"),
    Case("bank", has_ids=True, has_weights=True, radius=2.0),
    Case("bank", one_bandwidth=False, has_weights=True, radius=1.5),
]
UNDERFLOWS = [
    Case("bank", apart=100),  # all weight is the next rank's
    Case("bank", apart=100, far=50, has_weights=True),  # and there it underflows too
    Case("bank", far=200, bandwidth=10),  # so it does on all ranks, which weigh the same
    Case("bank", far=200, bandwidth=10, one_bandwidth=False, has_ids=True, has_weights=True),
    Case("self", exclude_self=True, has_weights=True, bandwidth=0.02),
    Case("self", apart=11, has_weights=True, bandwidth=1, heavier=30),  # far keys outweigh the near ones
]


def found(
    leaves: dict[str, Tensor], options: dict[str, object], case: Case, chosen: slice
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Result, mass, and gradients of these rows' part of a loss; `options` may hold a group."""
    own = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    arguments: dict[str, object] = {name: leaf for name, leaf in own.items() if name not in ("queries", "values")}
    arguments |= options | {"exclude_self": case.exclude_self, "radius": case.radius}
    if case.keys == "same":
        arguments["keys"] = own["queries"]
    result = gaussian_propagate(own["queries"], own["values"], **arguments)
    mass = gaussian_mass(own["queries"], **arguments)
    signal = rows(7, 100, 3)[: chosen.stop][chosen.start :].to(result)
    loss = (result * signal[:, :2]).sum() + (mass.masked_fill(mass == -math.inf, 0) * signal[:, 2]).sum()
    gradients = torch.autograd.grad(loss, list(own.values()), allow_unused=True, materialize_grads=True)
    return result.detach(), mass.detach(), dict(zip(own, gradients, strict=True))


def check(
    case: Case, counts: list[int], group: dist.ProcessGroup, *, backend: str = "cpu",
    dtype: torch.dtype = torch.float64, tolerance: float = 1e-9,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
    """Compare this rank's part with that of one process, and return it."""
    rank, total = dist.get_rank(group), sum(counts)
    chosen = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    leaves, ids = case.operands(counts)
    leaves = {name: leaf.to(dtype) for name, leaf in leaves.items()}
    wide = {name: leaf.double() for name, leaf in leaves.items()}
    expected = found(wide, ids | {"backend": "reference"}, case, slice(0, total))
    mine = {name: leaf if name == "bandwidth" and leaf.dim() == 0 else leaf[chosen] for name, leaf in leaves.items()}
    options = {name: each[chosen] for name, each in ids.items()} | {"backend": backend, "workspace_bytes": 400}
    actual = found(mine, options | {"group": group}, case, chosen)
    note = f"{case} {counts} rank {rank}"

    def close(name: str, one: Tensor, other: Tensor) -> None:
        scale = max(1.0, other[other.isfinite()].abs().max().item()) if other.isfinite().any() else 1.0
        torch.testing.assert_close(
            one.double(), other, rtol=tolerance, atol=tolerance * scale, msg=lambda text: f"{note} {name}: {text}"
        )

    close("result", actual[0], expected[0][chosen])
    close("mass", actual[1], expected[1][chosen])
    for name, gradient in actual[2].items():
        if name == "bandwidth" and gradient.dim() == 0:  # each rank's is its own part
            whole = gradient.clone()
            dist.all_reduce(whole, group=group)
            close(name, whole, expected[2][name])
        else:
            close(name, gradient, expected[2][name][chosen])
    return actual


@contextmanager
def largest_gather(num_bytes: int) -> Iterator[Callable[[], tuple[int, int]]]:
    """Set the size from which rows go round; yield what counts the forwards and backwards that they went round for."""
    forward = mock.patch.object(ring, "propagate", wraps=ring.propagate)
    backward = mock.patch.object(ring, "differentiate", wraps=ring.differentiate)
    limit = mock.patch.object(dispatch, "LARGEST_GATHER_BYTES", num_bytes)
    with forward as forwards, backward as backwards, limit:
        yield lambda: (forwards.call_count, backwards.call_count)


def compare_all(group: dist.ProcessGroup) -> None:
    for counts in COUNTS[dist.get_world_size(group)]:
        for case in CASES + UNDERFLOWS:
            with largest_gather(0) as went_round:
                turned = check(case, counts, group, tolerance=1e-7 if case in UNDERFLOWS else 1e-9)
                assert went_round() == (2, 2)
            with largest_gather(1 << 30) as went_round:
                gathered = check(case, counts, group, tolerance=1e-7 if case in UNDERFLOWS else 1e-9)
                assert went_round() == (0, 0)
            torch.testing.assert_close(turned, gathered, rtol=1e-7, atol=1e-7)
        with largest_gather(0):
            check(CASES[3], counts, group, backend="auto", dtype=torch.float32, tolerance=2e-5)
            check(CASES[7], counts, group, backend="auto", dtype=torch.float32, tolerance=2e-5)
            check(CASES[6], counts, group, backend="auto", dtype=torch.bfloat16, tolerance=2e-2)


def check_size_rule(group: dist.ProcessGroup) -> None:
    counts = COUNTS[dist.get_world_size(group)][0]
    leaves, ids = CASES[7].operands(counts)
    own = slice(sum(counts[: dist.get_rank(group)]), sum(counts[: dist.get_rank(group) + 1]))
    queries, options = leaves["queries"][own], {"bandwidth": 1.0, "group": group, "backend": "cpu"}
    options |= {
        name: each[own] for name, each in (leaves | ids).items() if name not in ("queries", "bandwidth", "values")
    }
    num_bytes = sum(counts) * ROW_BYTES
    for limit, changes, expected in (
        (num_bytes, {}, 0),
        (num_bytes - 1, {}, 1),
        (0, {"backend": "reference"}, 0),
        (0, {"backend": "auto"}, 0),  # float64: the reference
        (0, {"neighbours": 1}, 0),
        (0, {"neighbours": sum(counts)}, 1),  # all of them
    ):
        with largest_gather(limit) as went_round, torch.no_grad():
            gaussian_propagate(queries, leaves["values"][own], **(options | changes))
            assert went_round() == (expected, 0), (limit, changes)


class _LargestSide(TorchDispatchMode):
    """Remember the longest side of any matrix that an operation makes."""

    longest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.dim() == 2:
                self.longest = max(self.longest, *tensor.shape)
        return out


def check_memory(group: dist.ProcessGroup) -> None:
    world = dist.get_world_size(group)
    x, values = rows(0, 40, 3).requires_grad_(), rows(1, 40, 2).requires_grad_()
    for limit, expected in ((0, 40), (1 << 30, 40 * world)):
        with largest_gather(limit), _LargestSide() as mode:
            result = gaussian_propagate(x, values, bandwidth=1.0, group=group, backend="cpu")
            result.sum().backward()
        assert mode.longest == expected


def check_not_a_number(group: dist.ProcessGroup) -> None:
    """A NaN in a query spoils its row, in a value its column, on whichever rank; a row without keys is zero."""
    rank = dist.get_rank(group)
    x, values, bank = rows(rank, 4, 3), rows(10 + rank, 4, 2), rows(20 + rank, 4, 3)
    ids = {"query_ids": torch.tensor([1, 1, 0, 0]), "key_ids": torch.zeros(4, dtype=torch.int64)}
    with largest_gather(0) as went_round:
        if rank == 0:
            x[0, 0] = math.nan
            values[1, 1] = math.nan
        options = {"bandwidth": 1.0, "keys": bank, "group": group, "backend": "cpu"}
        result = gaussian_propagate(x, values, **options)
        assert result[:, 1].isnan().all()
        assert result[:, 0].isnan().tolist() == [rank == 0, False, False, False]
        x.nan_to_num_(0)
        values.nan_to_num_(0)
        leaf = x.requires_grad_()
        result, mass = gaussian_propagate(leaf, values, **options, **ids), gaussian_mass(leaf, **options, **ids)
        assert (result[2:] == 0).all()
        assert (mass == -math.inf).tolist() == [False, False, True, True]
        (result.sum() + mass[:2].sum()).backward()
        assert torch.isfinite(leaf.grad).all()
        assert (leaf.grad[2:] == 0).all()
        assert went_round() == (3, 2)


def check_far_shards(group: dist.ProcessGroup) -> None:
    """Rows whose weight lies on their own rank cost no softmax over the other ranks' keys."""
    x, values = rows(0, 9, 3) + 100 * dist.get_rank(group), rows(1, 9, 2)
    with largest_gather(0), mock.patch.object(blocked, "recompute", wraps=blocked.recompute) as recompute:
        result = gaussian_propagate(x, values, bandwidth=0.5, group=group, backend="cpu")
        assert recompute.call_count == 0
        torch.testing.assert_close(result, gaussian_propagate(x, values, bandwidth=0.5))
        values[2, 1] = math.nan if dist.get_rank(group) == 0 else 0
        result = gaussian_propagate(x, values, bandwidth=0.5, group=group, backend="cpu")
        assert recompute.call_count == 0
        assert torch.equal(result.isnan(), torch.tensor([False, True]).expand(9, 2))


def _work(rank: int, address: str) -> None:
    torch.set_num_threads(1)
    # imported while a group exists, it would keep that group and its threads (see test_gaussian.py)
    importlib.import_module("torch._dynamo")
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=4)
    groups = [dist.new_group(members) for members in GROUPS]
    for members, group in zip(GROUPS, groups, strict=True):
        if rank in members:
            compare_all(group)
            check_size_rule(group)
            check_memory(group)
            check_not_a_number(group)
            check_far_shards(group)
    dist.barrier()
    del group
    groups.clear()
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.multiprocess
def test_ranks_equal_one_process_when_their_keys_go_round(tmp_path_factory: pytest.TempPathFactory) -> None:
    address = str(tmp_path_factory.mktemp("gloo") / "store")
    mp.spawn(_work, args=(address,), nprocs=4)


def test_a_merge_keeps_empty_rows_and_passes_on_not_a_number() -> None:
    log_mass = torch.tensor([-math.inf, -math.inf, 0.0, 1.0, math.nan, 800.0, -900.0])
    log_part = torch.tensor([-math.inf, 2.0, -math.inf, 1.0, 0.0, 799.0, -math.inf])
    result, part = torch.zeros(7, 1), torch.zeros(7, 1)
    result[2:], part[1], part[3:6] = 4, 2, 2
    merged, mass = ring.merge(result, log_mass, part, log_part)
    share = 1 / (1 + math.exp(-1))
    expected = torch.tensor([0, 2, 4, 3, math.nan, 2 + 2 * share, 4])[:, None]
    torch.testing.assert_close(merged, expected, equal_nan=True)
    ends = torch.tensor([-math.inf, 2, 0, 1 + math.log(2), math.nan, 800 + math.log1p(math.exp(-1)), -900])
    torch.testing.assert_close(mass, ends, equal_nan=True)
