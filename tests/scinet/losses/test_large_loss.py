"""Which unknown cells are rejected: those of the largest losses in the global batch."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scinet.losses.large_loss import is_rejected, smallest_rejected_loss


@settings(deadline=None)
@given(seed=st.integers(0, 99), count=st.integers(1, 30))
def test_rejected_are_the_largest_losses_of_unknown_cells(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 7, generator=generator)
    observed = torch.randint(-1, 2, (6, 7), generator=generator).to(torch.int8)
    smallest = smallest_rejected_loss(logits, observed, count)
    rejected = is_rejected(logits, observed, smallest)
    unknown = sorted(logits[observed == 0].tolist(), reverse=True)
    assert sorted(logits[rejected].tolist(), reverse=True) == unknown[:count]
    assert not rejected[observed != 0].any()
    strictly = is_rejected(logits, observed, smallest, strictly=True)
    assert int(strictly.sum()) == (count - 1 if count <= len(unknown) else len(unknown))
