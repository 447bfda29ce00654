"""Which cells the class-aware selective loss trains on."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scinet.losses.selective import is_selected, least_likely_positive


@settings(deadline=None)
@given(seed=st.integers(0, 99), count=st.integers(0, 30))
def test_likeliest_unknown_cells_and_common_classes_are_left_out(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(6, 5, generator=generator)
    observed = torch.randint(-1, 2, (6, 5), generator=generator).to(torch.int8)
    common = torch.tensor([False, True, False, False, False])
    least = least_likely_positive(probabilities, observed, count)
    selected = is_selected(probabilities, observed, least, common=common)
    assert selected[observed != 0].all()
    assert not selected[:, 1][observed[:, 1] == 0].any()
    left = is_selected(probabilities, observed, least, common=None)
    likeliest = sorted(probabilities[observed == 0].tolist(), reverse=True)[:count]
    assert sorted(probabilities[~left].tolist(), reverse=True) == likeliest
