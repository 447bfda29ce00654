"""Examples out of loader processes, in the stream's order and some batches ahead of the model.

A process hands over several examples in one parcel with one tensor, since torch opens a file and a socket for every
tensor that it moves between processes.
"""

from __future__ import annotations

import atexit
import signal
import threading
import weakref
from collections.abc import Iterator
from itertools import islice, zip_longest
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from scinet.data import retries
from scinet.data.examples import Example
from scinet.data.views import Drawn
from scinet.errors import LoaderLost

_children: weakref.WeakSet[Any] = weakref.WeakSet()
_BATCHES_AHEAD = 2
_PARCEL = 16
# each holds an open file until it is taken, and a process may have 1,024
_MOST_PARCELS_AHEAD = 16


class _Parcel(NamedTuple):
    """The pixels [K, V, S, S, 3] uint8 of K examples, and all items in order, examples without their pixels.

    ``retries``: how often their sources were tried again.
    """

    pixels: Tensor
    items: list[Any]
    retries: int


class _Rest(NamedTuple):
    """An example without its pixels."""

    cutouts: Any
    others: tuple[Any, ...]


def loaded(stream: IterableDataset[Any], *, workers: int, batch_size: int) -> Iterator[Any]:
    """Yield what a stream gives, :class:`Example` or anything else, read by ``workers`` processes or by this one.

    Args:
        stream: gives worker w of W the items w, w + W, ... .
        workers: processes.
        batch_size: items that the caller takes between two steps; about twice as many are read ahead.

    Raises:
        LoaderLost: if one of the processes is killed.
    """
    if not workers:
        yield from stream
        return
    size, ahead = _parcels(workers, batch_size)
    parcels = DataLoader(
        stream,
        batch_size=size,
        collate_fn=_packed,
        num_workers=workers,
        prefetch_factor=ahead,
        worker_init_fn=_begin,
    )
    for turn in _turns(parcels, workers):
        for items in zip_longest(*map(_unpacked, turn)):
            yield from (item for item in items if item is not None)


def num_waiting(workers: int, batch_size: int) -> int:
    """Return how many examples may wait to be taken; see :func:`loaded`."""
    size, ahead = _parcels(workers, batch_size)
    return workers * size * ahead


def _parcels(workers: int, batch_size: int) -> tuple[int, int]:
    """Return the examples of a parcel, and the parcels that each process may be ahead."""
    ahead = -(-_BATCHES_AHEAD * batch_size // max(workers, 1))
    size = max(min(_PARCEL, batch_size), -(-ahead // _MOST_PARCELS_AHEAD))
    return size, max(2, -(-ahead // size))


def _turns(parcels: DataLoader[Any], workers: int) -> Iterator[list[_Parcel]]:
    """Yield one parcel of each process; in the last turn those whose items are over have none."""
    coming = _started(parcels)
    try:
        while turn := list(islice(coming, workers)):
            yield turn
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        # beside torch's own words, what its sockets say when a process ends while it hands over a parcel
        is_torchs = str(error).startswith("DataLoader worker")
        if str(error).startswith("Caught ") or (isinstance(error, RuntimeError) and not is_torchs):
            raise
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise LoaderLost(
            f"a loader process ended before its samples: {reason}; if memory ran out, lower data.workers or "
            "data.shuffle_window"
        ) from error


def _started(parcels: DataLoader[Any]) -> Iterator[_Parcel]:
    """Start the processes, and leave their end to be found where their parcels are waited for.

    torch's handler of SIGCHLD raises wherever this process happens to be, within a backward pass for instance.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD)
    try:
        coming: Any = iter(parcels)
        _children.update(coming._workers)
        return cast(Iterator[_Parcel], coming)
    finally:
        if is_main:
            signal.signal(signal.SIGCHLD, before)


def _begin(_worker: int) -> None:
    """Let a launcher's SIGTERM, sent to all processes, leave the samples that the last step needs; count from zero."""
    retries.take()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _kill_children() -> None:
    """End what is left, before multiprocessing would wait for processes that take no SIGTERM."""
    for child in _children:
        if child.is_alive():
            child.kill()


def _packed(items: list[Any]) -> _Parcel:
    pixels = [item.drawn.pixels for item in items if isinstance(item, Example)]
    rest = [
        _Rest(item.drawn.cutouts, (item.known, item.observed, item.index, item.sample_id))
        if isinstance(item, Example)
        else item
        for item in items
    ]
    # torch's collating, unlike its stack(), writes where the other process reads
    return _Parcel(default_collate(pixels) if pixels else torch.empty(0), rest, retries.take())


def _unpacked(parcel: _Parcel) -> Iterator[Any]:
    retries.add(parcel.retries)
    pixels = iter(parcel.pixels)
    for item in parcel.items:
        yield Example(Drawn(next(pixels), item.cutouts), *item.others) if isinstance(item, _Rest) else item
