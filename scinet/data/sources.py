"""Where shards and the data card are: a local folder, a URL prefix or a pipe; every shard is read as one stream."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from scinet.data import card as data_card
from scinet.data import retries, shardcache, transports
from scinet.data.card import DataCard, Shard
from scinet.data.remote import FIRST_PAUSE_S, RemoteStream
from scinet.data.tar_headers import LocalStream, Stream
from scinet.errors import DataError
from scinet.options import DataOptions

_LARGEST_CARD = 2**28


def read_card(options: DataOptions, path: str = "") -> DataCard:
    """Return the data card of a folder or URL prefix.

    Args:
        options: the ``data`` section.
        path: instead of ``data.path``.

    Raises:
        ConfigError: if there is none, or the address cannot be opened as it is written.
        DataError: if it is damaged, or does not come.
    """
    path = path or options.path
    if not transports.is_remote(path):
        return data_card.read(Path(_local(path)), prepare=options.prepare)
    transports.check(path, allow_pipe=options.allow_pipe)
    if options.cache_shards:
        shardcache.check(options.cache_shards)
    address = transports.join(path, data_card.CARD_NAME)
    with contextlib.closing(_remote(address, options)) as stream:
        content = stream.read(_LARGEST_CARD)
    return data_card.parse(content, transports.shown(address), prepare=options.prepare, url=path)


def place(card: DataCard) -> str:
    """Return the folder or URL of a data set as messages name it."""
    return transports.shown(card.url) if card.url else str(card.directory)


def shard_name(card: DataCard, shard: Shard) -> str:
    """Return what a shard is called in messages."""
    return transports.shown(transports.join(card.url, shard.file)) if card.url else str(card.directory / shard.file)


@contextlib.contextmanager
def opened(card: DataCard, shard: Shard, options: DataOptions) -> Iterator[Stream]:
    """Give a shard's bytes; what was read to its end from a remote is checked against the card's SHA-256.

    Raises:
        DataError: naming the shard, if it is gone, stalls, fails, or is not what the card says.
    """
    if not card.url:
        with _open_local(card.directory / shard.file, options.retries) as file:
            yield LocalStream(file)
        return
    address = transports.join(card.url, shard.file)
    stream = _remote(address, options, size=shard.num_bytes, sha256=shard.sha256)
    if options.cache_shards:
        folder = Path(options.cache_shards).expanduser()
        cached = shardcache.fetched(shard, stream, folder, timeout_s=options.timeout_s)
        if cached is not None:
            with _open_local(cached, options.retries) as file:
                yield LocalStream(file)
            return
        stream = _remote(address, options, size=shard.num_bytes, sha256=shard.sha256)
    with contextlib.closing(stream):
        yield stream


def _local(path: str) -> str:
    return unquote(urlsplit(path).path) if path.lower().startswith("file://") else path


def _remote(address: str, options: DataOptions, *, size: int | None = None, sha256: str = "") -> RemoteStream:
    return RemoteStream(
        transports.shown(address),
        transports.opener(address),
        timeout_s=options.timeout_s,
        retries=options.retries,
        size=size,
        sha256=sha256,
    )


def _open_local(path: Path, most_retries: int) -> BinaryIO:
    attempt = 0
    while True:
        try:
            return path.open("rb")
        except OSError as error:
            if attempt == most_retries:
                raise DataError(f"shard {path} cannot be read: {error.strerror} ({attempt + 1} attempts)") from error
        time.sleep(FIRST_PAUSE_S * 2**attempt)
        attempt += 1
        retries.add()
