"""Known rates count the cells that training will see, and their intervals are Wilson's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from scinet.data.examples import Mask
from scinet.data.mask_rates import MaskSurvey, wilson
from scinet.data.stream import Order, SampleStream
from scinet.options import DataOptions
from tests.scinet.conftest import MakeShards


@pytest.mark.parametrize(
    "given", [{}, {"single_positive": True}, {"flipped_labels": 0.3, "class_ratio_spread": 1.0}], ids=str
)
def test_survey_counts_what_training_sees(make_shards: MakeShards, given: dict[str, Any]) -> None:
    card = make_shards(60, shard_samples=11)
    survey = MaskSurvey(card)
    mask = Mask(DataOptions(known_ratio=0.4, mask_seed=3, **given), card.training_positives)
    rows = {row.sample_id: row for row in survey.rows("train", mask, lambda *_: None)}
    known, flipped = np.zeros((2, 3), dtype=int), np.zeros((2, 3), dtype=int)
    for sample in SampleStream(card, "train", Order(0, 0, 1, 0)):
        observed = mask(sample.truth, sample.sample_id)
        for row, sign in enumerate((1, -1)):
            known[row] += (sample.truth == sign) & (observed != 0)
            flipped[row] += (sample.truth == sign) & (observed == -sign)
        assert rows[sample.sample_id].positives == tuple(np.flatnonzero(observed == 1))
        assert rows[sample.sample_id].negatives == tuple(np.flatnonzero(observed == -1))
    assert survey.known.tolist() == known.tolist()
    assert survey.total.tolist() == [[20] * 3, [20] * 3]
    assert survey.flipped.tolist() == flipped.tolist()
    assert flipped.any() == ("flipped_labels" in given)
    assert (survey.num_samples, survey.num_missing, survey.num_contradictions, survey.num_added) == (
        60,
        0,
        flipped.sum(),
        0,
    )


@pytest.mark.parametrize(("known", "total"), [(0, 1), (1, 1), (0, 62), (328, 3360), (5929, 58924), (7, 7)])
def test_interval_is_that_of_scipy(known: int, total: int) -> None:
    low, high = wilson(np.array([known]), np.array([total]))
    expected = binomtest(known, total).proportion_ci(0.95, method="wilson")
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_interval_is_everything_when_nothing_was_counted() -> None:
    low, high = wilson(np.array([0]), np.array([0]))
    assert (low[0], high[0]) == (0, 1)
