"""Dynamic thresholds against the formula of method.md section 4, written as plain loops."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scinet.fusion.thresholds import DynamicThresholds

CPU = torch.device("cpu")


def _thresholds(rows: list[list[bool]], num_classes: int, hard_k: int) -> list[float]:
    """beta_c = max(n_c / max(max n, K n - sum n), 1/C); T_c = 0.95 beta_c / (2 - beta_c)."""
    counts = [sum(row[c] for row in rows) for c in range(num_classes)]
    scale = max(*counts, hard_k * len(rows) - sum(counts), 1)
    betas = [max(count / scale, 1 / num_classes) for count in counts]
    return [0.95 * beta / (2 - beta) for beta in betas]


@settings(deadline=None, max_examples=25)
@given(
    num_classes=st.integers(2, 6),
    hard_k=st.integers(1, 7),
    window=st.integers(1, 10),
    batches=st.lists(st.integers(1, 14), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_thresholds_equal_the_plain_loop_when_batches_have_any_size(
    num_classes: int, hard_k: int, window: int, batches: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tested = DynamicThresholds(num_classes, hard_k=hard_k, window=window, device=CPU)
    seen: list[list[bool]] = []
    for size in batches:
        passed = torch.rand(size, num_classes, generator=generator) < 0.4
        tested.update(passed)
        seen += passed.tolist()
        expected = _thresholds(seen[-window:], num_classes, hard_k)
        assert tested.thresholds().tolist() == pytest.approx(expected, rel=1e-5)


def test_thresholds_are_lowest_when_nothing_was_seen() -> None:
    tested = DynamicThresholds(4, hard_k=2, window=8, device=CPU)
    assert tested.thresholds().tolist() == pytest.approx([0.95 * 0.25 / 1.75] * 4)


def test_threshold_is_highest_when_a_class_passes_always() -> None:
    tested = DynamicThresholds(3, hard_k=1, window=8, device=CPU)
    tested.update(torch.tensor([[True, False, False]]).expand(8, 3))
    assert tested.thresholds()[0].item() == pytest.approx(0.95)


def _pseudo_labels(
    probabilities: Tensor, observed: Tensor, thresholds: list[float], hard_k: int
) -> tuple[list[list[float]], list[bool], list[list[bool]]]:
    labels, confident, pseudo = [], [], []
    for row, known in zip(probabilities.tolist(), observed.tolist(), strict=True):
        top = sorted(range(len(row)), key=lambda c: -row[c])[:hard_k]
        passed = [c in top and row[c] >= thresholds[c] for c in range(len(row))]
        labels.append([float(passed[c] if known[c] == 0 else known[c] > 0) for c in range(len(row))])
        confident.append(any(passed))
        pseudo.append([passed[c] and known[c] == 0 for c in range(len(row))])
    return labels, confident, pseudo


@settings(deadline=None, max_examples=25)
@given(num_classes=st.integers(1, 6), hard_k=st.integers(1, 8), seed=st.integers(0, 99))
def test_pseudo_labels_equal_the_plain_loop_when_drawn_at_random(num_classes: int, hard_k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tested = DynamicThresholds(num_classes, hard_k=hard_k, window=16, device=CPU)
    tested.update(torch.rand(9, num_classes, generator=generator) < 0.5)
    probabilities = torch.rand(11, num_classes, generator=generator)
    observed = torch.randint(-1, 2, (11, num_classes), generator=generator).to(torch.int8)
    labels, confident, pseudo = tested.pseudo_labels(probabilities, observed)
    expected = _pseudo_labels(probabilities, observed, tested.thresholds().tolist(), hard_k)
    assert (labels.tolist(), confident.tolist(), pseudo.tolist()) == expected
    assert labels.dtype == torch.float32


def test_class_passes_when_its_probability_is_the_threshold_itself() -> None:
    tested = DynamicThresholds(3, hard_k=3, window=8, device=CPU)
    tested.update(torch.tensor([[True, False, False]]).expand(5, 3))
    exact = tested.thresholds()[None]
    _, confident, pseudo = tested.pseudo_labels(exact, torch.zeros(1, 3, dtype=torch.int8))
    assert pseudo.all()
    assert confident.all()
    below = torch.nextafter(exact, torch.zeros(()))
    assert not tested.pseudo_labels(below, torch.zeros(1, 3, dtype=torch.int8))[2].any()


def test_known_cells_override_when_the_teacher_disagrees() -> None:
    tested = DynamicThresholds(3, hard_k=3, window=4, device=CPU)
    probabilities = torch.tensor([[0.99, 0.01, 0.99]])
    labels, _, pseudo = tested.pseudo_labels(probabilities, torch.tensor([[-1, 1, 0]], dtype=torch.int8))
    assert labels.tolist() == [[0, 1, 1]]
    assert pseudo.tolist() == [[False, False, True]]


def test_image_holds_nothing_when_no_top_class_passes() -> None:
    tested = DynamicThresholds(2, hard_k=1, window=4, device=CPU)
    labels, confident, pseudo = tested.pseudo_labels(torch.tensor([[0.1, 0.05]]), torch.zeros(1, 2, dtype=torch.int8))
    assert not labels.any()
    assert not confident.any()
    assert not pseudo.any()


def test_thresholds_go_on_equally_when_their_state_was_saved() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (DynamicThresholds(3, hard_k=2, window=7, device=CPU) for _ in range(2))
    first.update(torch.rand(10, 3, generator=generator) < 0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    more = torch.rand(4, 3, generator=generator) < 0.5
    for tested in (first, second):
        tested.update(more)
    assert torch.equal(first.thresholds(), second.thresholds())
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_nothing_changes_when_a_batch_holds_no_sample() -> None:
    thresholds = DynamicThresholds(3, hard_k=2, window=4, device=torch.device("cpu"))
    thresholds.update(torch.tensor([[True, False, True]]))
    before = {name: value.clone() for name, value in thresholds.state_dict().items()}
    thresholds.update(torch.zeros(0, 3, dtype=torch.bool))
    assert all(torch.equal(before[name], value) for name, value in thresholds.state_dict().items())
