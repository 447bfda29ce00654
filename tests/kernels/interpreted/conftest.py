"""Kernels in Triton's interpreter or on a GPU: small tiles, inputs amid infinities, a reason where both are missing."""

import os

import pytest
import torch
from torch import Tensor

from scinet_kernels import tiles
from scinet_kernels.tiles import Tile

IS_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETING else "cuda"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if IS_INTERPRETING or torch.cuda.is_available():
        return
    reason = "needs a GPU, or TRITON_INTERPRET=1 in a process of its own: make interpreted"
    for item in items:
        if item.get_closest_marker("interpreter"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["streamed", "held"])
def small_tiles(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Edges of tiles are met at sizes that the interpreter can do in time; query rows read again, or held."""
    small = Tile(rows=16, columns=16, inner=16, values=16, num_warps=4, num_stages=2)
    for key in list(tiles.TABLE):
        monkeypatch.setitem(tiles.TABLE, key, small)
    if request.param == "held":
        for bits in (16, 32):
            held = Tile(rows=16, columns=16, inner=64, values=16, num_warps=4, num_stages=2)
            monkeypatch.setitem(tiles.TABLE, ("gaussian_forward_held", tiles.ARCHITECTURES[0], bits), held)


def amid_infinities(tensor: Tensor, *, margin: int, transposed: bool) -> Tensor:
    """Return the matrix as a view into a larger buffer of infinities.

    A read past an edge shows: in the result, or, where a mask hides it there, as numpy's warning of inf - inf. The
    margin decides the stride, so that no two operands need share one.
    """
    rows, columns = tensor.shape
    buffer = torch.full((rows + 1 + margin, columns + 2 + margin), torch.inf, dtype=tensor.dtype)
    buffer = buffer.T.contiguous().T if transposed else buffer
    view = buffer[1 : rows + 1, 2 : columns + 2]
    view.copy_(tensor)
    return view
