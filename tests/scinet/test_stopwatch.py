"""Parts of a step are timed without waiting for the device."""

from __future__ import annotations

import time

import pytest
import torch

from scinet.stopwatch import Stopwatch


def test_each_part_is_given_once_also_when_it_fails() -> None:
    stopwatch = Stopwatch(torch.device("cpu"))
    with stopwatch:
        time.sleep(0.02)
    with pytest.raises(ValueError, match="it fails"), stopwatch:
        raise ValueError("it fails")
    first, second = stopwatch.take()
    assert first >= 0.02 > second >= 0
    assert stopwatch.take() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_part_is_given_once_the_device_has_passed_it() -> None:
    stopwatch = Stopwatch(torch.device("cuda"))
    ones = torch.ones(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with stopwatch:
        for _ in range(200):
            ones = ones @ ones * 1e-4
    assert stopwatch.take() == [], "it still computes, and nobody waits"
    torch.cuda.synchronize()
    (seconds,) = stopwatch.take()
    assert seconds > 0
