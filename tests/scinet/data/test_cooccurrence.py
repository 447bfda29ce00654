"""Pairs are counted exactly, in one piece or merged; large sets of classes keep the most frequent."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scinet.data import cooccurrence
from scinet.data.cooccurrence import PairCounter, from_tree

IMAGES = st.lists(st.sets(st.integers(0, 6), max_size=5).map(sorted), max_size=20)


@given(images=IMAGES, cut=st.integers(0, 20), waiting=st.sampled_from([1, 10, 2**20]))
def test_counts_are_those_of_a_loop_when_merged_or_not(images: list[list[int]], cut: int, waiting: int) -> None:
    expected = Counter(pair for labels in images for pair in combinations(labels, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cooccurrence, "_MAX_WAITING", waiting)
        total = PairCounter(7)
        for part in (images[:cut], images[cut:]):
            counter = PairCounter(7)
            for labels in part:
                counter.add(labels)
            total.merge(*counter.pairs())
        found = total.result()
    assert dict(zip(zip(found.first, found.second, strict=True), found.num_images, strict=True)) == expected
    assert (found.is_whole, found.num_pairs) == (True, len(expected))
    assert from_tree(json.loads(json.dumps(found.tree()))) == found


def test_most_frequent_pairs_are_kept_when_classes_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cooccurrence, "LARGEST_PAIRS", 2)
    counter = PairCounter(1001)
    for labels in ([1, 2], [1000, 1000], [3, 900], [3, 900], [0, 1000], [0, 1000], [0, 1000]):
        counter.add(labels)
    found = counter.result()
    assert (found.first, found.second, found.num_images) == ((0, 3), (1000, 900), (3, 2))
    assert (found.num_pairs, found.is_whole, found.tree()["kept"]) == (4, False, "the 2 most frequent pairs")
