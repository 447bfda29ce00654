"""Ratios are judged by what they are and by how sure they are."""

from __future__ import annotations

import pytest

from scinet.pairing import Verdict, table, take_turns


@pytest.mark.parametrize(
    ("samples", "wanted"),
    [
        ((1.0, 3.0, 2.0), (1.0, 3.0)),
        (tuple(range(1, 9)), (1, 8)),
        # (1 + 9) / 2^9 of each side is 2 %, one more would be 9 %
        (tuple(range(1, 10)), (2, 8)),
    ],
)
def test_interval_holds_the_median_in_95_percent(samples: tuple[float, ...], wanted: tuple[float, float]) -> None:
    assert Verdict("x", samples).interval == wanted


@pytest.mark.parametrize(
    ("samples", "answer"),
    [
        ((1.0, 1.1, 1.05), "yes"),
        ((1.0, 1.1, 1.2), "yes, but the interval reaches above"),
        ((1.0, 1.2, 1.2), "no, but the interval reaches below"),
        ((1.2, 1.3, 1.4), "no"),
    ],
)
def test_target_is_met_by_the_median(samples: tuple[float, ...], answer: str) -> None:
    assert Verdict("x", samples, target=1.1).is_met == answer


def test_share_is_a_mean_so_that_bursts_count() -> None:
    burst = Verdict("x", (0.0, 0.0, 0.3), target=0.05, is_share=True)
    assert burst.figure == pytest.approx(0.1)
    assert table([burst]).splitlines()[2] == (
        "| x | 10.00% | 0.00% to 30.00% | at most 5.00% | no, but the interval reaches below |"
    )
    assert table([Verdict("y", (2.0,))]).splitlines()[2] == "| y | 2.000 | - | - | - |"


def test_contestants_take_turns_in_both_orders() -> None:
    order: list[str] = []
    taken = take_turns([lambda: order.append("a"), lambda: order.append("b")], 2, lambda: None, lambda _: None)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert [len(samples) for samples in taken] == [2, 2]
