"""What the methods of the zoo keep and hold at the class count of Open Images."""

from __future__ import annotations

import dataclasses

import pytest

from scinet import zoobench
from scinet.options import Method, Options
from scinet.zoo.catalogue import METHODS, table_bytes

C = 9605
SETTING = zoobench.Setting(num_samples=1024, num_classes=C, batch_size=16, num_steps=4)
UNIT = SETTING.batch_size * C * 4
MOST_TENSORS = 30  # as scinet/zoo/README.md says
A_CLASS = 64  # bytes, of counts and means


@pytest.mark.parametrize("method", METHODS)
def test_method_stays_within_what_is_stated_at_thousands_of_classes(method: Method) -> None:
    found = zoobench.measure(method, SETTING)
    options = dataclasses.replace(Options(), method=method)
    stated = table_bytes(options, SETTING.num_samples, C)
    if method is Method.scpnet:
        # its relation between classes, and a window of pseudo-positives
        stated += C * C * 4 + options.loss.threshold_window * C
    assert stated <= found.kept <= stated + A_CLASS * C
    assert 2 * UNIT < found.step <= MOST_TENSORS * UNIT


def test_table_beyond_its_budget_is_refused_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoobench, "METHODS", (Method.bce, Method.role))
    text = zoobench.report(zoobench.Setting(1_000_000, C, 2, 1), lambda _: None)
    assert "role    refused" in text
    assert "method=role keeps 12 bytes" in text
    assert "zoo.memory_budget_mb=2048" in text
