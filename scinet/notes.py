"""What ranks tell each other outside of collectives, from any thread: short texts, and that they fail.

It goes through the store that rank 0 serves. Once the host of rank 0 is gone without a word, a question to the store
returns after a quarter of an hour, whatever its time-out says; the questions here are given up after seconds.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from scinet.distributed import Ranks
from scinet.errors import FIRST_CURABLE, PeerLost, TrainingError

T = TypeVar("T")
_ANSWER_S = 5.0
_FAILED = "scinet/failed"
_REPEATED = "scinet/failed/repeated"
_HEARD = "scinet/failed/heard"
_LOOKS_PER_S = 20


class _Line:
    """The way to the store: one question at a time, each answered in seconds or given up."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._is_overdue = False

    def ask(self, question: Callable[[Store], T]) -> T:
        """Return the store's answer.

        Raises:
            ConnectionError: there is none.
        """
        answers: list[T] = []

        def carry() -> None:
            try:
                # a ValueError where the process group has ended meanwhile
                with contextlib.suppress(RuntimeError, ValueError):
                    answers.append(question(dist.distributed_c10d._get_default_store()))
            finally:
                self._is_overdue = False
                self._turn.release()

        # nobody waits behind a question that was given up: a rank may have one for each of hundreds of others
        if not self._turn.acquire(timeout=0 if self._is_overdue else _ANSWER_S):
            raise ConnectionError
        asking = threading.Thread(target=carry, name="store", daemon=True)
        asking.start()
        asking.join(_ANSWER_S)
        self._is_overdue = asking.is_alive()
        if not answers:
            raise ConnectionError
        return answers[0]


_line = _Line()


class Notes:
    """Short texts by key."""

    _made = count()

    def __init__(self, ranks: Ranks) -> None:
        """Open a board of its own; the n-th of every rank is the same one."""
        self._prefix = f"scinet/notes/{next(Notes._made)}/"
        self._has_store = dist.is_initialized()
        self._ranks = ranks

    def put(self, key: str, text: str) -> None:
        """Leave a text; a failure to reach the others shows where they are waited for."""
        if self._has_store:
            with contextlib.suppress(ConnectionError):
                _line.ask(lambda store: store.set(self._prefix + key, text))

    def is_first(self, key: str) -> bool:
        """Return whether no rank has asked this before; True where the others cannot be reached."""
        if self._has_store:
            with contextlib.suppress(ConnectionError):
                return _line.ask(lambda store: store.add(self._prefix + key, 1)) == 1
        return True

    def get(self, key: str) -> str | None:
        """Return a text, or None if there is none yet; does not wait for it."""

        def read(store: Store) -> str | None:
            return store.get(self._prefix + key).decode() if store.check([self._prefix + key]) else None

        if self._has_store:
            with contextlib.suppress(ConnectionError):
                return _line.ask(read)
        return None

    def get_many(self, keys: Sequence[str]) -> dict[str, str]:
        """Return the texts there are, in two questions to the store where none is missing; does not wait for one."""
        paths = {key: self._prefix + key for key in keys}

        def read(store: Store) -> dict[str, str]:
            is_whole = store.check(list(paths.values()))
            there = [key for key, path in paths.items() if is_whole or store.check([path])]
            texts = store.multi_get([paths[key] for key in there]) if there else []
            return {key: text.decode() for key, text in zip(there, texts, strict=True)}

        if self._has_store:
            with contextlib.suppress(ConnectionError):
                return _line.ask(read)
        return {}

    def can_be_read(self) -> bool:
        """Return whether rank 0, where they lie, answers."""
        if self._has_store:
            try:
                _line.ask(lambda store: store.check([self._prefix]))
            except ConnectionError:
                return False
        return True


class Failures:
    """That ranks fail, and whether a restart would repeat it."""

    def __init__(self) -> None:
        """Begin with none; there need not be a process group yet."""
        self._is_repeated = False

    def tell(self, exit_status: int) -> bool:
        """Tell the others that this rank fails, and return whether it is the first, whose message is to be shown.

        No collective: the other ranks may be anywhere, waiting for this one.
        """
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if not _has_others():
            return local_rank == 0
        rank = dist.get_rank()

        def note(store: Store) -> bool:
            if exit_status < FIRST_CURABLE:
                store.add(_REPEATED, 1)
            store.set(f"{_HEARD}/{rank}", "")
            return store.add(_FAILED, 1) == 1

        try:
            is_first = _line.ask(note)
        except ConnectionError:
            # rank 0 is lost: of each host one rank says so, beside rank 0 the next one
            return local_rank == (1 if rank == local_rank else 0)
        if rank == 0 and exit_status < FIRST_CURABLE:
            _await_hearers()
        return is_first

    def elsewhere(self) -> int:
        """Return the exit status that this rank is to end with since another has failed, or 0 if none is known to."""
        if not _has_others():
            return 0

        def look(store: Store) -> int:
            if store.add(_FAILED, 0) == 0:
                return 0
            if store.add(_REPEATED, 0) == 0:
                return PeerLost.exit_status
            store.set(f"{_HEARD}/{dist.get_rank()}", "")
            self._is_repeated = True
            return TrainingError.exit_status

        # once heard it holds, also when rank 0 has ended since
        if self._is_repeated:
            return TrainingError.exit_status
        try:
            return _line.ask(look)
        except ConnectionError:
            return 0


def _has_others() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _await_hearers() -> None:
    """Let the others hear why rank 0 ends, before the store goes with it: they would take it for killed."""
    others = [f"{_HEARD}/{rank}" for rank in range(1, dist.get_world_size())]
    deadline = time.monotonic() + _ANSWER_S
    with contextlib.suppress(ConnectionError):
        while not _line.ask(lambda store: store.check(others)) and time.monotonic() < deadline:
            time.sleep(1 / _LOOKS_PER_S)
