"""Costs follow from the shape."""

import pytest
import torch

from scinet_kernels import estimate


def test_estimate_counts_products_and_bytes() -> None:
    cost = estimate("gaussian_propagate", (10, 20, 4, 3), torch.float32, "cpu")
    assert cost.flop == 2 * 10 * 20 * (4 + 3)
    assert (cost.bytes_read, cost.bytes_written) == (4 * (30 * 4 + 20 * 3), 4 * 30)
    assert cost.workspace_bytes > 0
    large = estimate("gaussian_propagate", (10**6, 10**4, 4, 3), torch.bfloat16, "cuda")
    assert large.workspace_bytes < (64 << 20) + 4 * 4 * (10**6 + 10**4) + 1
    for op, shape in {"gaussian_mass": (2, 3, 4), "gaussian_similarity": (2, 3, 4), "pearson": (5, 2)}.items():
        assert estimate(op, shape, torch.float32, "cpu").flop > 0
    with pytest.raises(ValueError, match="choose one of"):
        estimate("softmax", (1,), torch.float32, "cpu")
    with pytest.raises(ValueError, match="does not fit"):
        estimate("pearson", (1,), torch.float32, "cpu")
