"""The plan's arithmetic; that its bytes are those really sent is a matter of tests/system/test_traffic.py."""

from __future__ import annotations

import pytest

from scinet import config
from scinet.traffic import Kind, Links, Message, shared, step_seconds

LINKS = Links(ranks_per_host=4, inside=1e9, between=1e8, latency_s=1e-3)


@pytest.mark.parametrize(("kind", "rounds"), [(Kind.all_gather, 1), (Kind.reduce_scatter, 1), (Kind.all_reduce, 2)])
def test_ring_sends_all_but_a_rank_s_own_share(kind: Kind, rounds: int) -> None:
    message = Message("x", kind, 800, times=3)
    assert message.sent(8) == rounds * 3 * 700
    assert message.sent(1) == 0


def test_slowest_link_of_the_ring_counts() -> None:
    message = Message("x", Kind.all_gather, 10**9)
    assert LINKS.seconds(message, 4) == pytest.approx(3e-3 + 0.75)
    assert LINKS.seconds(message, 8) == pytest.approx(7e-3 + 8.75)
    assert LINKS.seconds(message, 1) == 0
    pieces = Message("x", Kind.all_gather, 10**9, pieces=5)
    assert LINKS.seconds(pieces, 4) == pytest.approx(5 * 3e-3 + 0.75)


def test_fusion_sends_every_row_once_whatever_the_accumulation() -> None:
    for steps in (1, 4):
        words = ["train.global_batch_size=64", f"train.accumulation_steps={steps}"]
        asked, answered = shared(config.load(None, words), 10, 16)
        assert asked.num_bytes * asked.times == 64 * (4 * 16 + 10 + 4 * 10 + 8)
        assert answered.num_bytes * answered.times == 64 * (4 * 10 + 10)


def test_method_of_the_zoo_sends_logits_and_labels_where_it_looks_at_the_global_batch() -> None:
    words = ["train.global_batch_size=64", "train.accumulation_steps=4"]
    (sent,) = shared(config.load(None, [*words, "method=ll_r"]), 10, 16)
    assert sent.num_bytes * sent.times == 64 * (4 * 10 + 10 + 8)
    assert shared(config.load(None, [*words, "method=bce"]), 10, 16) == []


def test_messages_hide_behind_their_share_of_the_computing() -> None:
    hidden, shown = Message("x", Kind.all_gather, 10**9, behind=0.5), Message("y", Kind.all_gather, 4 * 10**8)
    taken, exposed = step_seconds([hidden, shown], 2.0, LINKS, 4)
    assert (taken, exposed) == pytest.approx((2.303, 0.303))
    taken, exposed = step_seconds([hidden], 1.0, LINKS, 4)
    assert (taken, exposed) == pytest.approx((1.253, 0.253))


def test_step_is_no_shorter_than_its_messages() -> None:
    hidden = Message("x", Kind.all_gather, 10**9, behind=1.0)
    taken, exposed = step_seconds([hidden, hidden, hidden], 1.0, LINKS, 4)
    assert (taken, exposed) == pytest.approx((3 * 0.753, 3 * 0.753 - 1))
