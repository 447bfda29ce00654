"""Pairwise-complete Pearson against a float64 loop over pairs, and the streamed state against one pass."""

import copy
import gc
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scinet_kernels import PearsonState, pearson

MODEST = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**31)
ON_BOTH = pytest.mark.parametrize("backend", ["reference", "cpu"])


def table(seed: int, num_rows: int, num_classes: int, known_ratio: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated columns, a mask, and cell weights of 1 or 0.25."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(num_rows, 1, generator=generator, dtype=torch.float64)
    values = common + torch.randn(num_rows, num_classes, generator=generator, dtype=torch.float64)
    known = torch.rand(num_rows, num_classes, generator=generator) < known_ratio
    weights = torch.where(torch.rand(num_rows, num_classes, generator=generator) < 0.5, 1.0, 0.25).double()
    return values, known, weights


def oracle(
    values: Tensor, known: Tensor, weights: Tensor | None = None, min_count: float = 2, undefined: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Correlate each pair on its own: two passes, exact sums."""
    num_classes = values.shape[1]
    correlation = torch.full((num_classes, num_classes), undefined, dtype=torch.float64)
    count = torch.zeros(num_classes, num_classes, dtype=torch.float64)
    for a in range(num_classes):
        for b in range(num_classes):
            both = known[:, a] & known[:, b]
            x, y = values[both, a].double().tolist(), values[both, b].double().tolist()
            w = [1.0] * len(x) if weights is None else (weights[both, a] * weights[both, b]).tolist()
            count[a, b] = n = math.fsum(w)
            if n < min_count or n == 0:
                continue
            mx = math.fsum(p * q for p, q in zip(w, x, strict=True)) / n
            my = math.fsum(p * q for p, q in zip(w, y, strict=True)) / n
            vx = math.fsum(p * (q - mx) ** 2 for p, q in zip(w, x, strict=True))
            vy = math.fsum(p * (q - my) ** 2 for p, q in zip(w, y, strict=True))
            is_constant = len(set(x)) < 2 or len(set(y)) < 2
            if not is_constant:
                cov = math.fsum(p * (q - mx) * (r - my) for p, q, r in zip(w, x, y, strict=True))
                correlation[a, b] = cov / math.sqrt(vx * vy)
    return correlation, count


def streamed(
    values: Tensor, known: Tensor, weights: Tensor | None, cuts: list[int], backend: str = "auto"
) -> PearsonState:
    """Update one state block by block."""
    state = PearsonState(values.shape[1], backend=backend)
    for start, stop in zip([0, *cuts], [*cuts, len(values)], strict=True):
        state.update(values[start:stop], known[start:stop], None if weights is None else weights[start:stop])
    return state


@ON_BOTH
@given(n=st.integers(0, 30), c=st.integers(1, 6), seed=SEEDS, ratio=st.floats(0.1, 1), is_weighted=st.booleans())
@MODEST
def test_pearson_and_state_equal_the_loop_when_cells_are_missing(
    n: int, c: int, seed: int, ratio: float, is_weighted: bool, backend: str
) -> None:
    values, known, weights = table(seed, n, c, ratio)
    cell_weights = weights if is_weighted else None
    expected, expected_count = oracle(values, known, cell_weights, undefined=-7.0)
    actual, count = pearson(values, known, weights=cell_weights, undefined=-7.0, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(count, expected_count)
    assert torch.equal(actual, actual.T)
    assert torch.equal(count, count.T)
    state = streamed(values, known, cell_weights, [n // 3, n // 2], backend=backend)
    torch.testing.assert_close(state.correlation(undefined=-7.0)[0], expected, rtol=0, atol=1e-9)


@ON_BOTH
@given(seed=SEEDS, scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e6]), offset=st.floats(-10, 10), flip=st.booleans())
@MODEST
def test_correlation_is_unchanged_when_a_column_moves_or_scales(
    seed: int, scale: float, offset: float, flip: bool, backend: str
) -> None:
    values, known, _ = table(seed, 40, 3)
    base, _ = pearson(values, known, backend=backend)
    sign = -1 if flip else 1
    moved = values.clone()
    moved[:, 1] = (moved[:, 1] + offset) * (sign * scale)
    expected = base.clone()
    expected[1, [0, 2]] *= sign
    expected[[0, 2], 1] *= sign
    torch.testing.assert_close(pearson(moved, known, backend=backend)[0], expected, rtol=0, atol=1e-9)
    assert (base.abs() <= 1).all()
    assert (base.diagonal() == 1).all()


@ON_BOTH
@given(seed=SEEDS, cuts=st.lists(st.integers(0, 60), min_size=3, max_size=3).map(sorted))
@MODEST
def test_any_merge_tree_and_block_order_gives_the_same(seed: int, cuts: list[int], backend: str) -> None:
    values, known, weights = table(seed, 60, 4)
    values = values + 50
    expected, expected_count = pearson(values, known, weights=weights, backend=backend)
    bounds = list(zip([0, *cuts], [*cuts, 60], strict=True))
    a, b, c, d = (streamed(values[i:j], known[i:j], weights[i:j], [], backend=backend) for i, j in bounds)
    left, right = copy.deepcopy(a), copy.deepcopy(d)
    for other in (b, c, d):
        left.merge(other)
    c.merge(b)
    right.merge(c)
    right.merge(a)
    for state in (left, right, streamed(values, known, weights, cuts, backend=backend)):
        correlation, count = state.correlation()
        torch.testing.assert_close(correlation, expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(count, expected_count)
        cell_weights = torch.where(known, weights, 0)
        mean, weight = state.mean()
        torch.testing.assert_close(weight, cell_weights.sum(0))
        torch.testing.assert_close(mean, (cell_weights * values).sum(0) / cell_weights.sum(0))


@ON_BOTH
def test_decay_weighs_old_rows_by_its_power(backend: str) -> None:
    values, known, weights = table(0, 60, 4)
    state, by_argument = PearsonState(4, decay=0.9, backend=backend), PearsonState(4, backend=backend)
    parts = [slice(0, 20), slice(20, 40), slice(40, 60)]
    for part in parts:
        state.update(values[part], known[part], weights[part])
        by_argument.update(values[part], known[part], weights[part], decay=0.9)
    # A pair's weight is a product of two cell weights, so old rows carry the root of the decay in each cell.
    age = torch.repeat_interleave(torch.tensor([2.0, 1.0, 0.0]), 20)[:, None].double()
    expected, expected_count = pearson(values, known, weights=weights * 0.9 ** (age / 2), backend=backend)
    for one in (state, by_argument):
        correlation, count = one.correlation()
        torch.testing.assert_close(correlation, expected)
        torch.testing.assert_close(count, expected_count)
    mean, weight = state.mean()
    faded = torch.where(known, weights * 0.9**age, 0)
    torch.testing.assert_close(weight, faded.sum(0))
    torch.testing.assert_close(mean, (faded * values).sum(0) / faded.sum(0))
    for bad in (0.0, 1.5):
        with pytest.raises(ValueError, match="decay"):
            state.update(values, known, decay=bad)


@ON_BOTH
@pytest.mark.parametrize("hole", [math.nan, math.inf, 1e300])
def test_unknown_cells_never_leak(hole: float, backend: str) -> None:
    values, known, weights = table(1, 30, 4)
    weights[0] = 0  # a cell of weight 0 is unknown too
    holed = values.masked_fill(~known, hole)
    holed[0] = hole
    expected, expected_count = pearson(values[1:], known[1:], weights=weights[1:], backend=backend)
    leaf = holed.clone().requires_grad_()
    actual, count = pearson(leaf, known, weights=weights, backend=backend)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(count, expected_count)
    actual.square().sum().backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()
    assert (leaf.grad[~known] == 0).all()
    state = streamed(holed, known, weights, [7], backend=backend)
    torch.testing.assert_close(state.correlation()[0], expected)
    assert torch.isfinite(state.mean()[0]).all()


@ON_BOTH
@pytest.mark.parametrize("constant", [0.0, 0.1, 1.0, 12345.678])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_columns_are_undefined_and_pass_no_gradient(constant: float, dtype: torch.dtype, backend: str) -> None:
    values, known, weights = table(2, 1000, 3)
    values[:, 1] = constant
    values = values.to(dtype).requires_grad_()
    correlation, count = pearson(values, known, weights=weights, undefined=0.5, backend=backend)
    assert (correlation[1] == 0.5).all()
    assert (correlation[:, 1] == 0.5).all()
    assert correlation[0, 0] == correlation[2, 2] == 1
    assert (count[1] > 2).all()
    gradient = torch.autograd.grad(correlation.sum(), values)[0]
    assert (gradient[:, 1] == 0).all()
    assert torch.isfinite(gradient).all()
    state = streamed(values.detach(), known, weights, [1, 10, 500], backend=backend)
    late = streamed(values.detach()[:300], known[:300], weights[:300], [], backend=backend)
    late.merge(state)
    for one in (state, late):
        assert (one.correlation()[0][1] == 0).all()


@pytest.mark.parametrize(
    ("dtype", "backend", "deviation", "is_defined"),
    [
        (torch.float64, "reference", 2e-6, True),
        (torch.float64, "reference", 5e-7, False),
        (torch.float64, "cpu", 2e-6, True),
        (torch.float32, "reference", 1e-3, True),
        (torch.float32, "cpu", 8e-3, True),
        (torch.float32, "cpu", 4e-3, False),
    ],
)
def test_a_column_varies_when_its_deviation_is_above_the_documented_share_of_its_distance_to_the_mean(
    dtype: torch.dtype, backend: str, deviation: float, is_defined: bool
) -> None:
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64).repeat(100)
    beside = torch.arange(800) < 400
    first = torch.where(beside, 1 + deviation * sign, -1)  # the overall mean is 0, the one beside the second column 1
    known = torch.stack([torch.ones(800, dtype=torch.bool), beside], 1)
    values = torch.stack([first, sign], 1).to(dtype)
    state = PearsonState(2, backend=backend)
    state.update(values, known)
    for correlation in (pearson(values, known, backend=backend)[0], state.correlation()[0]):
        assert correlation[0, 1].item() == pytest.approx(1.0 if is_defined else 0.0, abs=0.02)


@ON_BOTH
def test_correlation_stays_within_one_when_columns_are_multiples(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        column = torch.randn(30, 1, generator=generator, dtype=torch.float64)
        correlation, _ = pearson(column * torch.tensor([1.0, 0.1, -3.7, 1e3]), backend=backend)
        assert (correlation.abs() <= 1).all()
        torch.testing.assert_close(correlation.abs(), torch.ones(4, 4, dtype=torch.float64))


@ON_BOTH
def test_a_column_that_is_constant_only_beside_another_is_undefined_only_there(backend: str) -> None:
    values = torch.tensor([[1.0, 0], [1, 1], [1, 3], [0, 9], [0, 9]])
    known = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 0], [1, 0]]).bool()
    correlation, count = pearson(values, known, undefined=math.nan, backend=backend)
    assert correlation[0, 0] == correlation[1, 1] == 1
    assert correlation[0, 1].isnan()
    assert correlation[1, 0].isnan()
    assert count.tolist() == [[5, 3], [3, 3]]


@ON_BOTH
def test_rounding_of_a_constant_is_no_variance_when_weights_are_uneven(backend: str) -> None:
    for seed in range(12):  # about half of these leave a variance of rounding size
        values, known, _ = table(seed, 999, 3)
        values[:, 0] = torch.where(known[:, 1], 0.1, values[:, 0])  # constant beside column 1, far from its pivot
        weights = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
        state = streamed(values, known, weights, [9], backend=backend)
        for correlation in (pearson(values, known, weights=weights, backend=backend)[0], state.correlation()[0]):
            assert correlation[0, 1] == correlation[1, 0] == 0
            assert correlation[0, 0] == 1
            assert correlation[0, 2] != 0


@ON_BOTH
def test_pairs_never_seen_together_and_rare_pairs_are_undefined(backend: str) -> None:
    values, known, _ = table(3, 20, 3, known_ratio=1.0)
    known[:10, 0] = False
    known[10:, 1] = False
    known[2:, 2] = False
    known[10, 2] = True
    correlation, count = pearson(values, known, backend=backend)
    assert count.tolist() == [[10, 0, 1], [0, 10, 2], [1, 2, 3]]
    assert correlation[0, 1] == correlation[0, 2] == 0
    assert correlation[1, 2].abs() == pytest.approx(1)
    correlation, _ = pearson(values, known, min_count=3, backend=backend)
    assert correlation[1, 2] == 0
    empty, none = PearsonState(3, backend=backend).correlation()
    assert (empty == 0).all()
    assert (none == 0).all()
    assert PearsonState(3, backend=backend).mean()[0].tolist() == [0, 0, 0]


@ON_BOTH
@pytest.mark.parametrize(("mean", "deviation"), [(1e4, 0.1), (1e6, 1e-3)])
def test_digits_survive_when_the_mean_is_huge(mean: float, deviation: float, backend: str) -> None:
    values, known, _ = table(4, 400, 3)
    values = values * deviation + mean
    known[:50, 2] = False  # a column first observed late still gets a pivot of its own
    expected, _ = oracle(values, known)
    torch.testing.assert_close(pearson(values, known, backend=backend)[0], expected, rtol=0, atol=1e-6)
    state = streamed(values, known, None, [50, 60, 300], backend=backend)
    torch.testing.assert_close(state.correlation()[0], expected, rtol=0, atol=1e-6)
    part = streamed(values[300:], known[300:], None, [], backend=backend)
    part.merge(streamed(values[:300], known[:300], None, [50], backend=backend))
    torch.testing.assert_close(part.correlation()[0], expected, rtol=0, atol=1e-6)


@ON_BOTH
def test_gradients_are_right_and_blind_to_shift_and_scale(backend: str) -> None:
    values, known, weights = table(5, 9, 3)
    leaf, leaf_weights = values.clone().requires_grad_(), weights.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: pearson(x, known, weights=w, min_count=1, backend=backend)[0], (leaf, leaf_weights)
    )
    full = values.clone().requires_grad_()
    signal = torch.arange(9.0, dtype=torch.float64).view(3, 3)
    gradient = torch.autograd.grad((pearson(full, backend=backend)[0] * signal).sum(), full)[0]
    assert gradient.abs().max() > 0.01
    zero = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(gradient.sum(0), zero, rtol=0, atol=1e-12)
    torch.testing.assert_close((gradient * values).sum(0), zero, rtol=0, atol=1e-12)


@ON_BOTH
def test_output_dtype_is_at_least_fp32(backend: str) -> None:
    values, known, _ = table(6, 30, 3)
    for dtype in (torch.float16, torch.bfloat16):
        correlation, count = pearson(values.to(dtype), known, backend=backend)
        assert correlation.dtype == count.dtype == torch.float32
        torch.testing.assert_close(correlation, pearson(values.to(dtype).double(), known, backend=backend)[0].float())


@ON_BOTH
def test_state_survives_a_checkpoint(backend: str) -> None:
    values, known, weights = table(7, 40, 4)
    state = streamed(values[:20], known[:20], weights[:20], [], backend=backend)
    saved = state.state_dict()
    state.update(values[20:], known[20:], weights[20:])
    resumed = PearsonState(4, backend=backend)
    resumed.load_state_dict(saved)
    resumed.update(values[20:], known[20:], weights[20:])
    for one, other in zip(resumed.correlation(), state.correlation(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="shape"):
        PearsonState(5, backend=backend).load_state_dict(saved)
    with pytest.raises(ValueError, match="holds"):
        resumed.load_state_dict({"pivot": saved["pivot"]})


def _reduce_on_rank(rank: int, address: str) -> None:
    """One of two processes; rank 0 never observes column 0, rank 1 never column 1."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    values, known, weights = table(8, 50, 4)
    values = values + 1e4
    known[:20, 0] = False
    known[20:, 1] = False
    own = slice(0, 20) if rank == 0 else slice(20, 50)
    expected, expected_count = pearson(values, known, weights=weights)
    state = streamed(values[own], known[own], weights[own], [5])
    state.all_reduce(dist.group.WORLD)
    correlation, count = state.correlation()
    torch.testing.assert_close(correlation, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(count, expected_count)
    torch.testing.assert_close(state.mean()[0], streamed(values, known, weights, []).mean()[0])
    whole, part = values.clone().requires_grad_(), values[own].clone().requires_grad_()
    signal = torch.arange(16.0, dtype=torch.float64).view(4, 4)
    (2 * pearson(whole, known, weights=weights)[0] * signal).sum().backward()  # two ranks, each with the loss
    sharded, _ = pearson(part, known[own], weights=weights[own], group=dist.group.WORLD)
    (sharded * signal).sum().backward()
    torch.testing.assert_close(sharded, expected, rtol=0, atol=1e-9)
    assert part.grad is not None
    assert whole.grad is not None
    torch.testing.assert_close(part.grad, whole.grad[own], rtol=1e-7, atol=1e-9)
    empty = PearsonState(4)
    if rank == 1:
        empty.update(values, known, weights)
    empty.all_reduce()
    torch.testing.assert_close(empty.correlation()[0], expected, rtol=0, atol=1e-9)
    half_narrow = PearsonState(4)
    half_narrow.update(values.float() if rank == 1 else values, known)
    half_narrow.all_reduce()
    assert half_narrow.state_dict()["is_narrow"] == 1
    gc.collect()  # so that the group dies here and joins its threads, not while the interpreter shuts down
    dist.destroy_process_group()


@pytest.mark.multiprocess
def test_all_reduce_equals_one_process_when_ranks_saw_different_columns(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    address = str(tmp_path_factory.mktemp("gloo") / "store")
    mp.spawn(_reduce_on_rank, args=(address,), nprocs=2)
