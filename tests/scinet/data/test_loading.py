"""What loader processes hand over comes in the stream's order, whole, and ahead of its use."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info

from scinet.data import retries
from scinet.data.examples import Example
from scinet.data.loading import loaded, num_waiting
from scinet.data.views import Box, Drawn
from scinet.errors import DataError

pytestmark = pytest.mark.timeout(120)


class _Numbers(IterableDataset[Any]):
    """Gives 0, 1, ... and counts how many were asked for; every third number is an example of that many."""

    def __init__(self, length: int, taken: Synchronized[int] | None = None) -> None:
        super().__init__()
        self._length, self._taken = length, taken

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, self._length, step):
            if self._taken is not None:
                with self._taken.get_lock():
                    self._taken.value += 1
            yield number if number % 3 else _example(number)


def _example(number: int) -> Example:
    pixels = torch.full((2, 4, 4, 3), number % 256, dtype=torch.uint8)
    cells = (np.array([number], dtype=np.int32), np.array([1], dtype=np.int8))
    return Example(Drawn(pixels, (None, Box(number, 1, 2, 3))), cells, cells, number, f"name {number}")


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 5), (1, 1), (1, 20), (2, 3), (3, 8), (3, 64)])
@pytest.mark.parametrize("length", [0, 1, 16, 49])
def test_items_come_in_the_streams_order_whatever_carries_them(workers: int, batch_size: int, length: int) -> None:
    found = list(loaded(_Numbers(length), workers=workers, batch_size=batch_size))
    assert [item.index if isinstance(item, Example) else item for item in found] == list(range(length))
    for item in found[::3]:
        want = _example(item.index)
        assert torch.equal(item.drawn.pixels, want.drawn.pixels)
        assert item.drawn.cutouts == want.drawn.cutouts
        assert item.sample_id == want.sample_id
        assert [part.tolist() for part in (*item.known, *item.observed)] == [[item.index], [1]] * 2


class _Deadly(_Numbers):
    """Ends its process at the hundredth number."""

    def __iter__(self) -> Iterator[Any]:
        for number in super().__iter__():
            if number == 100:
                os.kill(os.getpid(), signal.SIGKILL)
            yield number


def test_death_of_a_process_is_said_where_its_items_are_waited_for() -> None:
    items = loaded(_Deadly(1000), workers=1, batch_size=32)
    next(items)
    # the process is dead long before this is over, and nothing may be raised here
    for _ in range(40):
        time.sleep(0.05)
    with pytest.raises(DataError, match=r"a loader process ended.*lower data\.workers"):
        list(items)


@pytest.mark.parametrize(("workers", "batch_size"), [(1, 64), (2, 64), (3, 5), (2, 1000)])
def test_two_batches_are_read_ahead_while_the_model_computes(workers: int, batch_size: int) -> None:
    taken = multiprocessing.Value("i", 0)
    items = loaded(_Numbers(10_000, taken), workers=workers, batch_size=batch_size)
    next(items)
    waiting = num_waiting(workers, batch_size)
    assert 2 * batch_size <= waiting <= 2 * batch_size + 16 * workers
    deadline = time.monotonic() + 60
    while taken.value < waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    # those of the first turn were handed over, so as many more were asked for
    assert waiting <= taken.value <= waiting * 2
    items.close()  # type: ignore[attr-defined]


class _Retrying(_Numbers):
    """Tries again before each number."""

    def __iter__(self) -> Iterator[Any]:
        for number in super().__iter__():
            retries.add()
            yield number


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_retries_are_counted_once_wherever_they_happen(workers: int) -> None:
    retries.add(1000)  # of another epoch, known to a process that begins now
    before = retries.total()
    assert len(list(loaded(_Retrying(49), workers=workers, batch_size=8))) == 49
    assert retries.total() - before == 49
