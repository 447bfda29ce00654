"""Gaussian propagation between rows and pairwise-complete Pearson correlation between columns."""

from scinet_kernels.cost import Cost, estimate
from scinet_kernels.ops import (
    gaussian_mass,
    gaussian_propagate,
    gaussian_similarity,
    median_bandwidth,
    nearest_neighbours,
)
from scinet_kernels.pearson import PearsonState, pearson

__all__ = [
    "Cost",
    "PearsonState",
    "estimate",
    "gaussian_mass",
    "gaussian_propagate",
    "gaussian_similarity",
    "median_bandwidth",
    "nearest_neighbours",
    "pearson",
]
