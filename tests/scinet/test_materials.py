"""What is said about the data before a run."""

from __future__ import annotations

from dataclasses import replace

from scinet import materials
from tests.scinet.conftest import MakeSamples, MakeShards


def test_figures_are_doubted_when_nothing_is_known_to_be_absent(
    make_shards: MakeShards, make_samples: MakeSamples
) -> None:
    test = make_samples(4, "test")
    assert not list(materials.doubts(make_shards(samples=[*make_samples(4), *test])))
    positives_only = [replace(sample, negatives=()) for sample in test]
    (doubt,) = materials.doubts(make_shards(samples=[*make_samples(4), *positives_only]))
    assert "split 'test' of" in doubt
    assert "its mAP is 100 whatever a model says" in doubt
