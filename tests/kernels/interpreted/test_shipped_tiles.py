"""One case of each kernel at the tiles that are shipped, and the reason why no case here is in bf16."""

import pytest
import torch
from torch import Tensor

from scinet_kernels import gaussian_propagate, pearson
from tests.kernels.interpreted.conftest import DEVICE, IS_INTERPRETING

pytestmark = pytest.mark.interpreter


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def propagated(dtype: torch.dtype, backend: str) -> list[Tensor]:
    device = "cpu" if backend == "reference" else DEVICE
    points, values = rows(0, 150, 70).to(dtype) / 8, rows(1, 150, 130).to(dtype)
    wide = torch.float64 if backend == "reference" else dtype
    own = [tensor.to(device, wide).requires_grad_() for tensor in (points, values)]
    result = gaussian_propagate(*own, bandwidth=0.8, exclude_self=True, backend=backend)
    gradients = torch.autograd.grad((result * rows(2, 150, 130).to(result)).sum(), own)
    return [tensor.detach().double().cpu() for tensor in (result, *gradients)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 4e-3)])
def test_propagation_equals_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    for exact, found in zip(propagated(dtype, "reference"), propagated(dtype, "triton"), strict=True):
        assert ((found - exact).abs().max() / exact.abs().max()).item() < tolerance


def test_moments_equal_the_reference() -> None:
    values, known = rows(3, 300, 70), rows(4, 300, 70) > 0
    exact, _ = pearson(values, known, backend="reference")
    found, _ = pearson(values.float().to(DEVICE), known.to(DEVICE), backend="triton")
    assert (found.double().cpu() - exact).abs().max() < 1e-5


@pytest.mark.skipif(not IS_INTERPRETING, reason="the interpreter's own limit: hardware multiplies bf16")
def test_the_interpreter_still_multiplies_the_bit_patterns_of_bf16() -> None:
    points, values = rows(0, 20, 16).bfloat16() / 4, rows(1, 20, 3).bfloat16()
    exact = gaussian_propagate(points.double(), values.double(), bandwidth=0.8)
    found = gaussian_propagate(points, values, bandwidth=0.8, backend="triton")
    # once it multiplies numbers, this fails, and the cases above should take bf16 too
    assert not ((found - exact).abs().max() < 0.1)
