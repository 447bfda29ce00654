"""Bytes of a remote file as one stream that survives dropped connections and never waits without end.

Every block of 64 KiB has ``timeout_s`` in all: attempts, back-off between them, waits, and bytes that drip. After a
drop the file is opened again at the byte where it stopped; who cannot do that gives it from the start, and what was
had before is read and thrown away.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from scinet.data import retries
from scinet.errors import DataError

T = TypeVar("T")
BLOCK_BYTES = 64 * 2**10
FIRST_PAUSE_S = 0.25


class RawBytes(Protocol):
    """An open connection, file or process."""

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes as soon as there are any, none at the end."""
        ...

    def close(self) -> None:
        """Let go of it; called from another thread to end a read that takes too long."""
        ...


class RefusedError(OSError):
    """An answer that would be the same at the next attempt."""


class Opened(Protocol):
    """What :class:`RemoteStream` is given: opens the file at ``offset`` within ``timeout_s``.

    Returns the bytes, the offset where they really begin (0 where it cannot be chosen) and the file's size, if known.
    """

    def __call__(self, offset: int, timeout_s: float) -> tuple[RawBytes, int, int | None]:
        """Open."""
        ...


class RemoteStream:
    """A remote file, read once from its first byte; implements :class:`scinet.data.tars.Stream`."""

    def __init__(
        self, url: str, opened: Opened, *, timeout_s: float, retries: int, size: int | None = None, sha256: str = ""
    ) -> None:
        """Describe the file; nothing is opened yet.

        Args:
            url: names it in messages.
            opened: opens it.
            timeout_s: longest wait for a block of 64 KiB.
            retries: further attempts in a row without a new byte.
            size: bytes it must have, or None: as many as it says.
            sha256: what its bytes must hash to; checked by :meth:`finish`.
        """
        self._url, self._opened, self._timeout_s, self._retries = url, opened, timeout_s, retries
        self._size, self._sha256 = size or None, sha256
        self._raw: RawBytes | None = None
        self._raw_at = 0  # offset of the connection
        self._at = 0  # offset of the next byte for the buffer
        self._buffer = bytearray()
        self._digest = hashlib.sha256()
        self._caught_up_s = 0.0  # spent on the current block's earlier bytes

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes, fewer only at the file's end.

        Raises:
            DataError: naming the file, if it stalls, fails or has another size than it should.
        """
        while len(self._buffer) < size:
            block = self._block()
            if not block:
                break
            self._buffer += block
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def skip(self, size: int) -> None:
        """Read bytes and forget them."""
        while size > 0 and (taken := len(self.read(min(size, BLOCK_BYTES)))):
            size -= taken

    def finish(self) -> None:
        """Read what is left and check the whole.

        Raises:
            DataError: if its SHA-256 is not the expected one.
        """
        while self.read(BLOCK_BYTES):
            pass
        if self._sha256 and self._digest.hexdigest() != self._sha256:
            raise DataError(
                f"{self._url} has the SHA-256 {self._digest.hexdigest()}, the data card says {self._sha256}: "
                "it was damaged or replaced"
            )

    def close(self) -> None:
        """Let go of the connection."""
        if self._raw is not None:
            raw, self._raw = self._raw, None
            # a reader that hangs holds the connection's lock: closing must not wait for it
            threading.Thread(target=_close, args=(raw,), daemon=True).start()

    def _block(self) -> bytes:
        """Return the next block, however many attempts it takes; a shorter one, or none, at the end."""
        started = time.monotonic()
        self._caught_up_s = 0.0
        block = bytearray()
        attempt = 0
        while len(block) < BLOCK_BYTES:
            deadline = started + self._timeout_s + self._caught_up_s
            limit = min(self._timeout_s / (self._retries + 1), deadline - time.monotonic())
            try:
                piece = self._attempt(limit)
            except (OSError, EOFError) as error:
                self.close()
                pause = FIRST_PAUSE_S * 2**attempt
                attempt += 1
                is_final = isinstance(error, RefusedError) or attempt > self._retries
                if is_final or time.monotonic() + pause >= deadline:
                    raise DataError(self._failure(attempt, error)) from error
                time.sleep(pause)
                retries.add()
                continue
            if not piece:
                break
            attempt = 0
            self._digest.update(piece)
            self._at += len(piece)
            block += piece
        return bytes(block)

    def _attempt(self, limit_s: float) -> bytes:
        if self._raw is None:
            self._raw, self._raw_at, size = within(lambda: self._opened(self._at, limit_s), limit_s)
            self._check_size(size)
            if self._raw_at < self._at:
                self._catch_up(self._raw, limit_s)
        raw = self._raw
        block = within(lambda: raw.read(BLOCK_BYTES), limit_s)
        if not block and self._size is not None and self._at < self._size:
            raise EOFError("it ended early")
        self._raw_at += len(block)
        return block

    def _catch_up(self, raw: RawBytes, limit_s: float) -> None:
        """Pass over what was had before, where the source begins anew; that takes its time, but not a drip's."""
        started = time.monotonic()
        slowest_s = self._timeout_s * (1 + (self._at - self._raw_at) / BLOCK_BYTES)
        while self._raw_at < self._at:
            passed = within(lambda: raw.read(min(BLOCK_BYTES, self._at - self._raw_at)), limit_s)
            if not passed:
                raise EOFError("it ended early")
            if time.monotonic() - started > slowest_s:
                raise TimeoutError("too slow")
            self._raw_at += len(passed)
        self._caught_up_s += time.monotonic() - started

    def _check_size(self, size: int | None) -> None:
        if size is None or self._size == size:
            return
        if self._size is not None:
            raise DataError(
                f"{self._url} has {size} bytes, the data card says {self._size}: it is truncated or was replaced"
            )
        self._size = size

    def _failure(self, attempts: int, error: Exception) -> str:
        what = f"stalled for {self._timeout_s:g} s" if isinstance(error, TimeoutError) else f"failed: {_told(error)}"
        of = f" of {self._size}" if self._size else ""
        return (
            f"{self._url} {what} (at byte {self._at}{of}, {attempts} attempts; data.timeout_s={self._timeout_s:g}, "
            f"data.retries={self._retries})"
        )


def within(work: Callable[[], T], seconds: float) -> T:
    """Return the result of work that may hang; a hanging one is left behind in its thread.

    Raises:
        TimeoutError: if it takes longer.
    """
    outcome: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((work(), None))
        except BaseException as error:  # handed to the caller, whatever it is
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = outcome.get(timeout=max(seconds, 0.001))
    except queue.Empty:
        raise TimeoutError("no answer") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _told(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _close(raw: RawBytes) -> None:
    with contextlib.suppress(OSError, ValueError):
        raw.close()
