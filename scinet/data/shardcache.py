"""The local cache of remote shards: written once a machine, checked against the data card, then renamed.

Files are named by their SHA-256, so that data sets and runs share them and nothing stale is ever read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from scinet.data.card import Shard
from scinet.data.remote import BLOCK_BYTES, RemoteStream
from scinet.errors import ConfigError

_log = logging.getLogger(__name__)
_POLL_S = 0.05
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_given_up: set[Path] = set()  # folders this process no longer writes to, each of which was warned about once
_checked: set[tuple[Path, int, int]] = set()  # shards that this process has hashed: path, time of change, inode


def check(folder: str) -> None:
    """Make the cache folder and see that it can be written.

    Raises:
        ConfigError: if it cannot.
    """
    probe = Path(folder).expanduser() / f".probe-{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"data.cache_shards={folder} cannot be written: {reason}; name another folder") from error


def fetched(shard: Shard, stream: RemoteStream, folder: Path, *, timeout_s: float) -> Path | None:
    """Return the shard's file in the cache, after downloading it if need be, or None: read the source itself.

    Args:
        shard: from the data card.
        stream: the shard's bytes, not read yet; closed at the end.
        folder: the cache.
        timeout_s: how long another process may download without a new byte before it is no longer waited for.

    Raises:
        DataError: if the source fails or the bytes have another SHA-256 than the card says.
    """
    path = folder / f"{shard.sha256}.tar"
    if _is_whole(path, shard):
        return path
    if folder in _given_up:
        return None
    part = folder / f".{path.name}.part"
    try:
        with _locked(part, timeout_s) as is_ours:
            if not is_ours:
                return None
            if not _is_whole(path, shard):
                if path.exists():
                    _log.warning("the cached shard %s is damaged: it is fetched again", path)
                _download(stream, part)
                os.replace(part, path)
    except OSError as error:
        _given_up.add(folder)
        reason = "is full" if error.errno in _FULL else f"cannot be written ({error.strerror})"
        _log.warning("the shard cache %s %s: shards that it lacks are streamed", folder, reason)
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        return None
    return path


def _is_whole(path: Path, shard: Shard) -> bool:
    """Tell whether a shard is there as the card says; its bytes are checked once a process."""
    with contextlib.suppress(OSError):
        status = path.stat()
        state = (path, status.st_mtime_ns, status.st_ino)
        if status.st_size != shard.num_bytes or state in _checked:
            return status.st_size == shard.num_bytes
        with path.open("rb") as file:
            is_same = hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
        if is_same:
            _checked.add(state)
        return is_same
    return False


def _download(stream: RemoteStream, part: Path) -> None:
    try:
        with part.open("wb") as file:
            while block := stream.read(BLOCK_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        stream.finish()
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        stream.close()


@contextlib.contextmanager
def _locked(part: Path, timeout_s: float) -> Iterator[bool]:
    """Hold the lock of a download, or give False once its holder has written nothing for ``timeout_s``."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.with_suffix(".lock").open("w") as lock:
        seen, since = -1, time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                size = part.stat().st_size if part.exists() else 0
                if size != seen:
                    seen, since = size, time.monotonic()
                elif time.monotonic() - since > timeout_s:
                    yield False
                    return
                time.sleep(_POLL_S)
            else:
                break
        yield True  # the lock goes with the file
