"""Exact nearest neighbours against sorting all explicit distances."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scinet_kernels import gaussian_propagate, nearest_neighbours

MODEST = settings(deadline=None, max_examples=25)


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    b=st.integers(1, 25), m=st.integers(1, 25), d=st.integers(1, 20), k=st.integers(1, 8), seed=st.integers(0, 2**31)
)
@MODEST
def test_neighbours_equal_a_full_sort_when_keys_are_given(b: int, m: int, d: int, k: int, seed: int) -> None:
    queries, keys = rows(seed, b, d), rows(seed + 1, m, d)
    index, squared = nearest_neighbours(queries, k, keys=keys)
    assert index.shape == squared.shape == (b, k)
    assert (index.dtype, squared.dtype) == (torch.int64, torch.float32)
    distance = (queries[:, None].double() - keys[None].double()).square().sum(2)
    found = min(k, m)
    expected = distance.sort(dim=1).values[:, :found]
    torch.testing.assert_close(squared[:, :found].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(distance.gather(1, index[:, :found]), expected, rtol=1e-5, atol=1e-6)
    assert all(len(set(row)) == found for row in index[:, :found].tolist())
    assert (index[:, found:] == -1).all()
    assert (squared[:, found:] == torch.inf).all()


def test_lower_index_wins_when_distances_tie() -> None:
    points = torch.tensor([[1.0, 0], [0, 1], [1, 0], [-1, 0], [0, -1], [-1, 0]])
    index, squared = nearest_neighbours(torch.zeros(1, 2), 4, keys=points)
    assert index.tolist() == [[0, 1, 2, 3]]
    assert squared.tolist() == [[1, 1, 1, 1]]
    index, squared = nearest_neighbours(points, 2)
    assert index[0].tolist() == [2, 1]
    assert squared[0].tolist() == [0, 2]
    only_first = gaussian_propagate(torch.zeros(1, 2), torch.eye(6), bandwidth=1.0, keys=points, neighbours=2)
    torch.testing.assert_close(only_first, torch.tensor([[0.5, 0.5, 0, 0, 0, 0]]))


def test_own_row_counts_only_when_it_is_not_excluded() -> None:
    x = rows(0, 12, 4)
    index, _ = nearest_neighbours(x, 3)
    assert (index != torch.arange(12)[:, None]).all()
    index, squared = nearest_neighbours(x, 3, exclude_self=False)
    assert (index[:, 0] == torch.arange(12)).all()
    assert (squared[:, 0] == 0).all()


def test_equal_ids_are_left_out() -> None:
    x, ids = rows(0, 9, 4), torch.arange(9) // 3
    index, _ = nearest_neighbours(x, 6, query_ids=ids)
    assert (ids[index] != ids[:, None]).all()
    index, _ = nearest_neighbours(x[:2], 9, keys=x, query_ids=ids[:2], key_ids=ids)
    assert sorted(index[0].tolist()) == [-1, -1, -1, 3, 4, 5, 6, 7, 8]


def test_every_slot_is_empty_when_no_key_is_allowed() -> None:
    index, squared = nearest_neighbours(rows(0, 1, 3), 2)
    assert index.tolist() == [[-1, -1]]
    assert (squared == torch.inf).all()
    index, squared = nearest_neighbours(rows(0, 2, 3), 2, keys=torch.zeros(0, 3))
    assert (index == -1).all()
    assert nearest_neighbours(torch.zeros(0, 3), 2)[0].shape == (0, 2)


def test_chunks_change_nothing_when_the_workspace_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(0, 40, 5)
    whole = nearest_neighbours(x, 4)
    monkeypatch.setattr("scinet_kernels.ops.DEFAULT_WORKSPACE_BYTES", 4000)
    for one, other in zip(nearest_neighbours(x, 4), whole, strict=True):
        assert torch.equal(one, other)


def test_small_distances_are_exact_when_rows_lie_far_from_the_origin() -> None:
    x = torch.tensor([[1000.0, 0], [1000.25, 0], [-900, 0]])
    _, squared = nearest_neighbours(x, 1)
    assert squared[:2, 0].tolist() == [0.0625, 0.0625]


def test_distance_gradient_holds_the_choice_fixed() -> None:
    x, keys = rows(0, 4, 3).requires_grad_(), rows(1, 6, 3).requires_grad_()
    index, squared = nearest_neighbours(x, 2, keys=keys)
    dx, dkeys = torch.autograd.grad(squared.sum(), (x, keys))
    torch.testing.assert_close(dx, 2 * (x[:, None] - keys[index]).sum(1).detach())
    torch.testing.assert_close(dkeys.sum(0), -dx.sum(0))
