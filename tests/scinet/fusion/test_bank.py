"""The bank holds the last M samples, each row of one sample."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scinet.fusion.bank import Bank, Neighbours

CPU = torch.device("cpu")


def _batch(start: int, size: int) -> Neighbours:
    """Rows whose every column says which sample they are."""
    numbers = torch.arange(start, start + size)
    return Neighbours(
        numbers[:, None] + torch.tensor([0.25, 0.5, 0.75]),
        torch.stack([numbers % 3 - 1, (numbers + 1) % 3 - 1], dim=1).to(torch.int8),
        (numbers[:, None] % 7).float().expand(-1, 2) / 7,
        numbers,
    )


def _bank(size: int, *, keeps_confidence: bool = True) -> Bank:
    return Bank(size, 3, 2, keeps_confidence=keeps_confidence, device=CPU)


def _assert_holds(bank: Bank, first: int, stop: int) -> None:
    rows = bank.rows()
    order = rows[3].argsort()
    for column, expected in zip(rows, _batch(first, stop - first), strict=True):
        assert torch.equal(column[order], expected.to(column.dtype))


@settings(deadline=None, max_examples=25)
@given(size=st.integers(1, 12), batches=st.lists(st.integers(1, 30), max_size=8))
def test_bank_holds_the_last_samples_when_batches_have_any_size(size: int, batches: list[int]) -> None:
    bank, seen = _bank(size), 0
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
    assert [len(column) for column in bank.rows()] == [0, 0, 0, 0]


def test_bank_is_empty_when_nothing_was_written() -> None:
    assert [tuple(column.shape) for column in _bank(4).rows()] == [(0, 3), (0, 2), (0, 2), (0,)]


def test_confidence_takes_no_memory_when_it_is_not_kept() -> None:
    bank = _bank(4, keeps_confidence=False)
    bank.append(_batch(0, 6))
    embeddings, observed, confidence, index = bank.rows()
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
