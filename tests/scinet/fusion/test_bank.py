"""The bank holds the last M samples, each row of one sample."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scinet.fusion.bank import Bank, Neighbours, blank, choose_regions, plain_rows, rows_of
from scinet.model.network import Output

NUM_SAMPLES = 400


def _batch(start: int, size: int) -> Neighbours:
    """Rows whose every column says which sample they are."""
    numbers = torch.arange(start, start + size)
    return plain_rows(
        numbers[:, None] + torch.tensor([0.25, 0.5, 0.75]),
        torch.stack([numbers % 3 - 1, (numbers + 1) % 3 - 1], dim=1).to(torch.int8),
        (numbers[:, None] % 7).float().expand(-1, 2) / 7,
        numbers,
    )


def _bank(size: int, *, keeps_confidence: bool = True, is_ring: bool = False) -> Bank:
    rows = blank(size, 2, 3, confidence=2 if keeps_confidence else 0)
    return Bank(rows, num_samples=NUM_SAMPLES, is_ring=is_ring)


def _assert_holds(bank: Bank, first: int, stop: int) -> None:
    rows = bank.rows()
    order = rows[3].argsort()
    for column, expected in zip(rows, _batch(first, stop - first), strict=True):
        assert torch.equal(column[order], expected.to(column.dtype))


@settings(deadline=None, max_examples=25)
@given(size=st.integers(1, 12), batches=st.lists(st.integers(1, 30), max_size=8), is_ring=st.booleans())
def test_bank_holds_the_last_samples_when_batches_have_any_size(
    size: int, batches: list[int], *, is_ring: bool
) -> None:
    bank, seen = _bank(size, is_ring=is_ring), 0
    for number in batches:
        bank.append(_batch(seen, number))
        seen += number
        _assert_holds(bank, max(0, seen - size), seen)


def test_rows_keep_the_order_of_the_samples_when_the_bank_is_not_full() -> None:
    bank = _bank(8)
    bank.append(_batch(0, 3))
    bank.append(_batch(3, 2))
    assert bank.rows()[3].tolist() == [0, 1, 2, 3, 4]


def test_oldest_rows_go_first_when_the_bank_is_full() -> None:
    bank = _bank(5)
    bank.append(_batch(0, 4))
    bank.append(_batch(4, 3))
    assert bank.rows()[3].tolist() == [5, 6, 2, 3, 4]


def test_bank_stays_empty_when_its_size_is_zero() -> None:
    bank = _bank(0)
    bank.append(_batch(0, 4))
    assert len(bank) == 0
    assert [len(column) for column in bank.rows()] == [0] * 6


def test_bank_is_empty_when_nothing_was_written() -> None:
    assert [tuple(column.shape) for column in _bank(4).rows()[:4]] == [(0, 3), (0, 2), (0, 2), (0,)]


def test_confidence_takes_no_memory_when_it_is_not_kept() -> None:
    bank = _bank(4, keeps_confidence=False)
    bank.append(_batch(0, 6))
    embeddings, observed, confidence, index, *_ = bank.rows()
    assert confidence.shape == (4, 0)
    assert sorted(index.tolist()) == [2, 3, 4, 5]
    assert (len(embeddings), len(observed)) == (4, 4)


@pytest.mark.parametrize("keeps_confidence", [True, False])
@pytest.mark.parametrize("size", [0, 5, 40])
def test_bank_goes_on_equally_when_its_state_was_saved(size: int, *, keeps_confidence: bool) -> None:
    first, second = (_bank(size, keeps_confidence=keeps_confidence) for _ in range(2))
    first.append(_batch(0, 7))
    second.append(_batch(90, 9))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for bank in (first, second):
        bank.append(_batch(7, 4))
    for mine, theirs in zip(first.rows(), second.rows(), strict=True):
        assert torch.equal(mine, theirs)


def test_row_of_a_sample_is_replaced_when_it_comes_again() -> None:
    bank = _bank(5)
    bank.append(_batch(0, 4))
    again = _batch(2, 2)
    bank.append(again._replace(embeddings=-again.embeddings))
    rows = bank.rows()
    assert rows.indices.tolist() == [0, 1, 2, 3]
    assert (rows.embeddings[2:] < 0).all()


def test_ring_keeps_a_sample_twice_when_it_comes_again() -> None:
    bank = _bank(5, is_ring=True)
    bank.append(_batch(0, 3))
    bank.append(_batch(1, 3))
    assert bank.rows().indices.tolist() == [3, 1, 2, 1, 2]


@settings(deadline=None, max_examples=50)
@given(
    size=st.integers(1, 12),
    batches=st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=8, unique=True), max_size=12),
)
def test_bank_holds_each_sample_once_and_its_newest_row(size: int, batches: list[list[int]]) -> None:
    bank, newest = _bank(size), dict[int, int]()
    for number, samples in enumerate(batches):
        indices = torch.tensor(samples)
        stamps = torch.full((len(samples), 3), float(number))
        labels, confidence = torch.zeros(len(samples), 2, dtype=torch.int8), torch.zeros(len(samples), 2)
        bank.append(plain_rows(stamps, labels, confidence, indices))
        newest |= dict.fromkeys(samples, number)
        rows = bank.rows()
        held = rows.indices.tolist()
        assert len(held) == len(set(held)) == min(size, len(newest))
        assert set(samples[-size:]) <= set(held)
        assert rows.embeddings[:, 0].tolist() == [newest[sample] for sample in held]


def test_region_of_the_largest_relative_score_is_chosen() -> None:
    text = torch.eye(3)
    # region 0 speaks for everything, region 1 for class 1 alone
    regions = torch.tensor([[[0.9, 0.8, 0.7], [0.1, 0.5, 0.0]]])
    scores = regions @ text.T
    expected = [
        max(range(2), key=lambda r, c=c: float(scores[0, r, c] - (scores[0, r].sum() - scores[0, r, c]) / 2))
        for c in range(3)
    ]
    assert choose_regions(regions, text).tolist() == [expected] == [[0, 1, 0]]


@pytest.mark.parametrize(("given", "kept"), [(4, 4), (16, 4), (1, 4), (4, 0)])
def test_regions_are_kept_over_the_grid_that_is_asked_for(given: int, kept: int) -> None:
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(2, given, 8, generator=generator), dim=-1)
    output = Output(torch.zeros(2, 3), unit[:, 0], unit, torch.eye(3, 8))
    rows = rows_of(output, torch.zeros(2, 3, dtype=torch.int8), torch.arange(2), num_regions=kept)
    assert rows.regions.shape == (2, kept, 8)
    assert rows.choice.shape == (2, 3 if kept else 0)
    assert rows.regions.dtype == torch.float16
    torch.testing.assert_close(rows.regions.float().norm(dim=-1), torch.ones(2, kept), rtol=1e-3, atol=1e-3)
