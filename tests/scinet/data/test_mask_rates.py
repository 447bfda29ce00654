"""Known rates count the cells that training will see, and their intervals are Wilson's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from scinet.data.examples import Mask
from scinet.data.mask_rates import MaskSurvey, from_ratio, wilson
from scinet.data.stream import Order, SampleStream
from scinet.options import DataOptions
from tests.scinet.conftest import MakeShards


@pytest.mark.parametrize("single_positive", [False, True])
def test_survey_counts_what_training_sees(make_shards: MakeShards, single_positive: bool) -> None:
    card = make_shards(60, shard_samples=11)
    survey = MaskSurvey(card)
    mask = from_ratio(0.4, 3, single_positive=single_positive)
    rows = {row.sample_id: row for row in survey.rows("train", mask, lambda *_: None)}
    seen = Mask(DataOptions(known_ratio=0.4, mask_seed=3, single_positive=single_positive))
    known = np.zeros((2, 3), dtype=int)
    for sample in SampleStream(card, "train", Order(0, 0, 1, 0)):
        observed = seen(sample.truth, sample.sample_id)
        known += np.stack([observed == 1, observed == -1])
        assert rows[sample.sample_id].positives == tuple(np.flatnonzero(observed == 1))
        assert rows[sample.sample_id].negatives == tuple(np.flatnonzero(observed == -1))
    assert survey.known.tolist() == known.tolist()
    assert survey.total.tolist() == [[20] * 3, [20] * 3]
    assert (survey.num_samples, survey.num_missing, survey.num_contradictions, survey.num_added) == (60, 0, 0, 0)


@pytest.mark.parametrize(("known", "total"), [(0, 1), (1, 1), (0, 62), (328, 3360), (5929, 58924), (7, 7)])
def test_interval_is_that_of_scipy(known: int, total: int) -> None:
    low, high = wilson(np.array([known]), np.array([total]))
    expected = binomtest(known, total).proportion_ci(0.95, method="wilson")
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_interval_is_everything_when_nothing_was_counted() -> None:
    low, high = wilson(np.array([0]), np.array([0]))
    assert (low[0], high[0]) == (0, 1)
