"""What `scinet bench fusion` lets compete: our paths, the forms a user would write, and the bare products as the unit.

Every contestant of an operator gets the same inputs and must give the same result (checked before it is timed).
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scinet_kernels import PearsonState, gaussian_propagate

BANDWIDTH = 0.5
_PEARSON_ROWS_AT_ONCE = 4096
# Rows of the unit's products at once.
PANEL_ROWS = 2048
COMPILED = "torch.compile(cdist + exp)"


@dataclass(frozen=True)
class Inputs:
    """One problem: points [N, D], values [N, C], gradient of the result [N, C], and which cells are known [N, C]."""

    points: Tensor
    values: Tensor
    signal: Tensor
    known: Tensor


@dataclass(frozen=True)
class Contestant:
    """A way to compute the operator.

    Attributes:
        name: as printed.
        run: inputs to result.
        stored_matrices: N x N matrices that it holds at once, forward and backward, to skip what cannot fit.
        is_exact: whether its result is that of the operator; the unit's is not.

    """

    name: str
    run: Callable[[Inputs], Tensor]
    stored_matrices: int = 0
    is_exact: bool = True


def make_inputs(rows: int, width: int, columns: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Return unit vectors in clusters, uniform values, and 40 % known cells; the same for the same sizes.

    Args:
        rows: N.
        width: D.
        columns: C.
        device: where they live.
        dtype: of points, values and signal.

    """
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(32, width, generator=generator)
    which = torch.randint(32, (rows,), generator=generator)
    points = torch.nn.functional.normalize(centres[which] + torch.randn(rows, width, generator=generator), dim=1)
    values = torch.rand(rows, columns, generator=generator)
    signal = torch.randn(rows, columns, generator=generator)
    known = torch.rand(rows, columns, generator=generator) < 0.4
    return Inputs(points.to(device, dtype), values.to(device, dtype), signal.to(device, dtype), known.to(device))


def of_propagation(backends: list[str]) -> list[Contestant]:
    """Return the contestants of `gaussian_propagate`, queries being the keys; the unit comes first."""
    ours = [Contestant(f"ours ({backend})", _ours(backend)) for backend in backends]
    peers = [
        Contestant("cdist + exp", _cdist, 4),
        Contestant("softmax(addmm) @ c", _softmax, 3),
        Contestant("sdpa, bias as mask", _sdpa, 3),
    ]
    if importlib.util.find_spec("pykeops"):
        peers.append(Contestant("KeOps", _keops))
    return [Contestant("GEMM", _products, is_exact=False), *ours, *peers]


def compiled_form() -> Contestant:
    """Return `torch.compile` of the naive form; it needs a C++ compiler and takes half a minute the first time.

    Compiled anew for each size: what earlier sizes left would make it general, hence slower, and after eight of them
    uncompiled.
    """
    torch.compiler.reset()
    return Contestant(COMPILED, torch.compile(_cdist, dynamic=False), 4)


def of_correlation() -> list[Contestant]:
    """Return the contestants of the pairwise-complete Pearson correlation; the unit comes first."""
    peers = [Contestant("torch.corrcoef, no mask", lambda given: torch.corrcoef(given.values.T), is_exact=False)]
    if importlib.util.find_spec("pandas"):
        peers.append(Contestant("pandas DataFrame.corr", _pandas))
    unit = Contestant("GEMM", _gram, is_exact=False)
    return [unit, Contestant("ours, streamed", _streamed), Contestant("whole-array moments", _moments), *peers]


@functools.lru_cache(maxsize=2)
def _kept(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A buffer that is warm when it is timed: the unit must not pay for fresh memory."""
    return torch.ones(rows, columns, device=device, dtype=dtype)


def _products(given: Inputs) -> Tensor:
    """The two bare products of the forward, in panels so that no size is too large."""
    points, values = given.points, given.values
    panel = _kept(min(PANEL_ROWS, len(points)), len(points), points.device, points.dtype)
    result = torch.empty_like(values)
    for start in range(0, len(points), PANEL_ROWS):
        rows = slice(start, start + PANEL_ROWS)
        weights = torch.mm(points[rows], points.T, out=panel[: len(points[rows])])
        torch.mm(weights, values, out=result[rows])
    return result


def _ours(backend: str) -> Callable[[Inputs], Tensor]:
    return lambda given: gaussian_propagate(given.points, given.values, bandwidth=BANDWIDTH, backend=backend)


def _cdist(given: Inputs) -> Tensor:
    weights = torch.exp(torch.cdist(given.points, given.points).square() * (-0.5 / BANDWIDTH**2))
    return (weights @ given.values) / weights.sum(1, keepdim=True)


def _softmax(given: Inputs) -> Tensor:
    norms = given.points.square().sum(1)
    scale = BANDWIDTH**-2
    logits = torch.addmm(norms, given.points, given.points.T, beta=-0.5 * scale, alpha=scale)
    return logits.softmax(1) @ given.values


def _sdpa(given: Inputs) -> Tensor:
    scale = BANDWIDTH**-2
    bias = (given.points.square().sum(1) * (-0.5 * scale)).expand(len(given.points), -1)
    points, values = given.points[None, None], given.values[None, None]
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(points, points, values, attn_mask=bias[None, None], scale=scale)[0, 0]


def _keops(given: Inputs) -> Tensor:
    from pykeops.torch import LazyTensor

    difference = LazyTensor(given.points[:, None]) - LazyTensor(given.points[None])
    weights = ((difference**2).sum(2) * (-0.5 / BANDWIDTH**2)).exp()
    result: Tensor = (weights @ given.values) / weights.sum(1)
    return result


def _gram(given: Inputs) -> Tensor:
    """One product [3C, N] x [N, 2C], what the four moments cost at least when taken in one go."""
    rows, columns = given.values.shape
    operand = _kept(rows, 3 * columns, given.values.device, given.values.dtype)
    return operand.T @ operand[:, : 2 * columns]


def _streamed(given: Inputs) -> Tensor:
    state = PearsonState(given.values.shape[1], device=given.values.device)
    for start in range(0, len(given.values), _PEARSON_ROWS_AT_ONCE):
        rows = slice(start, start + _PEARSON_ROWS_AT_ONCE)
        state.update(given.values[rows], given.known[rows])
    return state.correlation()[0]


def _moments(given: Inputs) -> Tensor:
    """The same four moments over whole arrays, about the column means."""
    known = given.known.to(given.values.dtype)
    count = known.sum(0)
    shifted = (given.values - (given.values * known).sum(0) / count) * known
    n, first, second = known.T @ known, shifted.T @ known, shifted.square().T @ known
    variance = second - first.square() / n
    return (shifted.T @ shifted - first * first.T / n) / (variance * variance.T).sqrt()


def _pandas(given: Inputs) -> Tensor:
    import pandas

    frame = pandas.DataFrame(given.values.cpu().double().masked_fill(~given.known.cpu(), torch.nan).numpy())
    return torch.from_numpy(frame.corr().to_numpy().copy())
