"""What a row says: sums over the steps since the row before, by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from scinet.data.batch import Batch
from scinet.distributed import Ranks
from scinet.fusion.confidence import Confidence
from scinet.metering import Meter, Progress
from scinet.objective import Pseudo, Step
from scinet.telemetry import MetricsLog

ALONE = Ranks(0, 1, torch.device("cpu"))
# two samples of three classes: what the mask leaves, and what is true
OBSERVED = torch.tensor([[1, 0, 0], [0, -1, 0]], dtype=torch.int8)
TRUTH = torch.tensor([[1, 1, -1], [1, -1, 0]], dtype=torch.int8)
POSITIVE = torch.tensor([[False, True, True], [True, False, True]])


def _batch() -> Batch:
    return Batch(torch.zeros(2, 1), OBSERVED, TRUTH, torch.arange(2), ("a", "b"), torch.ones(2, dtype=torch.bool))


def _step(loss: float, *, confidence: Confidence | None = None, pseudo: bool = False) -> Step:
    labels = Pseudo(POSITIVE.float(), torch.ones(2, dtype=torch.bool), POSITIVE) if pseudo else None
    return Step(torch.tensor(2 * loss), {"supervised": torch.tensor(loss)}, confidence, labels)


def _meter(accumulation: int = 1) -> tuple[Meter, MetricsLog]:
    log = MetricsLog(None)
    return Meter(log, ALONE, num_classes=3, accumulation_steps=accumulation), log


def test_row_is_the_mean_over_the_micro_batches_since_the_row_before() -> None:
    meter, log = _meter(accumulation=2)
    for losses in ((1.0, 2.0), (3.0, 6.0)):
        meter.add([_step(loss) for loss in losses], [_batch(), _batch()], num_valid=4)
    row = meter.write(Progress(epoch=1, step=7, samples=28), {"learning_rate": 0.5}, None, _batch())
    assert row == log.rows[-1]
    assert (row["step"], row["epoch"], row["samples_seen"], row["learning_rate"]) == (7, 1, 28, 0.5)
    assert row["loss/supervised"] == pytest.approx(3.0)
    assert row["loss/total"] == pytest.approx(6.0)
    assert row["known_ratio"] == pytest.approx(2 * 4 / (8 * 3)), "two known cells in each of four micro-batches"
    meter.add([_step(5.0), _step(7.0)], [_batch(), _batch()], num_valid=4)
    assert meter.write(Progress(), {}, None, _batch())["loss/supervised"] == pytest.approx(6.0)
    assert "loss/supervised" not in meter.write(Progress(), {}, None, _batch())


def test_pseudo_labels_are_judged_on_hidden_cells_whose_truth_is_known() -> None:
    meter, _ = _meter()
    meter.add([_step(1.0, pseudo=True)], [_batch()], num_valid=2)
    row = meter.write(Progress(), {}, None, _batch())
    # made positive: (0, 1) and (1, 0) rightly, (0, 2) wrongly, (1, 2) nobody knows; no other was to be found
    assert (row["pseudo_positives"], row["pseudo_precision"], row["pseudo_recall"]) == (4, pytest.approx(2 / 3), 1)
    meter.add([_step(1.0)], [_batch()], num_valid=2)
    assert "pseudo_positives" not in meter.write(Progress(), {}, None, _batch())


def test_confidence_is_judged_on_hidden_cells_whose_truth_is_known() -> None:
    unified = torch.tensor([[0.0, 0.8, 0.1], [0.5, 0.9, 0.9]])
    confidence = Confidence(unified, torch.full((2, 3), 1.0), None, None)
    meter, _ = _meter()
    row = meter.write(Progress(), {}, _step(1.0, confidence=confidence), _batch())
    # hidden and true (0, 1), (1, 0), hidden and false (0, 2)
    assert row["log_loss/unified"] == pytest.approx(-(math.log(0.8) + math.log(0.5) + math.log(0.9)) / 3)
    assert row["log_loss/teacher"] == pytest.approx(-(2 * math.log(1 - 1e-4) + math.log(1e-4)) / 3)
    assert not {"log_loss/instance", "log_loss/label"} & row.keys()


def test_clocks_tell_samples_and_waiting_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("scinet.metering.time.monotonic", lambda: now[0])
    meter, _ = _meter()
    meter.begin()
    meter._window.started_s = now[0]
    for _ in range(2):
        meter.wait(0.5)
        meter.add([_step(1.0)], [_batch()], num_valid=6)
    now[0] = 104.0
    row = meter.write(Progress(), {}, None, _batch())
    assert (row["samples_per_second"], row["data_wait_share"]) == (3.0, 0.25)


def _sums(state: dict[str, Any]) -> dict[str, Any]:
    return {name: values for name, (_, values) in state["sums"].items()}


def test_sums_are_taken_up_by_their_ranks_or_by_the_first_when_there_were_others() -> None:
    meter, _ = _meter()
    meter.add([_step(1.5)], [_batch()], num_valid=2)
    state = json.loads(json.dumps(meter.state()))
    assert (state["steps"], state["samples"]) == (1, 2)
    again, _ = _meter()
    again.restore(state)
    assert again.state() == state
    state["sums"] = {name: [dtype, [*values, 10]] for name, (dtype, values) in state["sums"].items()}
    alone, _ = _meter()
    alone.restore(state)  # of two ranks
    assert _sums(alone.state()) == {name: [values[0] + 10] for name, values in _sums(meter.state()).items()}
    taken = []
    for rank in range(3):
        one = Meter(MetricsLog(None), Ranks(rank, 3, torch.device("cpu")), num_classes=3, accumulation_steps=1)
        one.restore(state)  # of two ranks, by three
        taken.append({name: float(value) for name, value in one._window.parts.items()})
    assert taken[0] == {name: values[0] for name, values in _sums(alone.state()).items()}
    assert set(taken[1].values()) == set(taken[2].values()) == {0.0}
    for rank in range(2):
        one = Meter(MetricsLog(None), Ranks(rank, 2, torch.device("cpu")), num_classes=3, accumulation_steps=1)
        one.restore(state)
        assert {name: float(v) for name, v in one._window.parts.items()} == {
            name: values[rank] for name, values in _sums(state).items()
        }
