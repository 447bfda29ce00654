"""Costs follow from the shape."""

import pytest
import torch

from scinet_kernels import estimate

WORKSPACE = 64 << 20
HALF, SINGLE = torch.bfloat16, torch.float32


def test_estimate_counts_products_and_bytes() -> None:
    cost = estimate("gaussian_propagate", (10, 20, 4, 3), SINGLE, "cpu")
    assert cost.flop == 2 * 10 * 20 * (4 + 3)
    assert (cost.bytes_read, cost.bytes_written) == (4 * (30 * 4 + 20 * 3), 4 * 30)
    assert cost.workspace_bytes == 4 * (10 * 20 + 30 * 6)
    for op, shape in {"gaussian_mass": (2, 3, 4), "gaussian_similarity": (2, 3, 4), "pearson": (5, 2)}.items():
        assert estimate(op, shape, SINGLE, "cpu").flop > 0
    assert estimate("nearest_neighbours", (2, 3, 4, 5), SINGLE, "cpu").bytes_written == 2 * 5 * 12


def test_estimate_names_the_path_that_auto_takes() -> None:
    large, small = (4096, 4096, 8, 3), (2047, 4096, 8, 3)
    assert estimate("gaussian_propagate", large, SINGLE, "cuda").backend == "triton"
    assert estimate("gaussian_propagate", small, SINGLE, "cuda").backend == "cpu"
    assert estimate("gaussian_propagate", large, SINGLE, "cpu").backend == "cpu"
    assert estimate("gaussian_propagate", large, torch.float64, "cuda").backend == "reference"
    assert estimate("nearest_neighbours", large, SINGLE, "cuda").backend == "cpu"
    assert estimate("gaussian_similarity", large[:3], SINGLE, "cuda").backend == "reference"
    assert estimate("pearson", (4096, 8), SINGLE, "cuda").backend == "triton"


def test_workspace_is_bounded_where_the_path_bounds_it() -> None:
    shape = (10**6, 10**6, 512, 80)
    assert estimate("gaussian_propagate", shape, SINGLE, "cpu").workspace_bytes == WORKSPACE
    assert estimate("gaussian_propagate", shape, HALF, "cuda").workspace_bytes == 2 * 10**6 * 8
    assert estimate("gaussian_propagate", shape, SINGLE, "cuda").workspace_bytes == 2 * 10**6 * (512 * 4 + 8)
    small, large = (estimate("pearson", (rows, 80), SINGLE, "cpu").workspace_bytes for rows in (10**5, 10**7))
    assert small == large < torch.get_num_threads() * (4 << 20)
    assert estimate("pearson", (10**7, 80), torch.float64, "cpu").workspace_bytes > 10**7 * 80 * 8


def test_lower_bound_is_that_of_an_h100_and_only_there() -> None:
    shape = (65536, 65536, 512, 80)
    assert estimate("gaussian_propagate", shape, HALF, "cuda").lower_bound_ms == pytest.approx(6.36, abs=0.01)
    single = estimate("gaussian_propagate", shape, SINGLE, "cuda").lower_bound_ms
    assert single == pytest.approx(6 * 6.36, rel=0.01)
    # bytes decide: read once at 3 TB/s
    mass = estimate("gaussian_propagate", (10**7, 1, 1, 1), HALF, "cuda")
    assert mass.lower_bound_ms == pytest.approx((mass.bytes_read + mass.bytes_written) / 3e9)
    assert estimate("pearson", (10**7, 80), HALF, "cuda").lower_bound_ms == pytest.approx(3.84, abs=0.01)
    assert estimate("gaussian_propagate", shape, HALF, "cpu").lower_bound_ms is None
    assert estimate("gaussian_propagate", shape, torch.float64, "cuda").lower_bound_ms is None


def test_estimate_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="choose one of"):
        estimate("softmax", (1,), SINGLE, "cpu")
    with pytest.raises(ValueError, match="does not fit"):
        estimate("pearson", (1,), SINGLE, "cpu")
    with pytest.raises(RuntimeError, match="device"):
        estimate("pearson", (1, 1), SINGLE, "abacus")
