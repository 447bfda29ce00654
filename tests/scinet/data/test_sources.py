"""A remote source is read whole or named; nothing waits without end."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from torch.utils.data import DataLoader

from scinet.data import retries, shardcache, sources, transports
from scinet.data.card import CARD_NAME, DataCard
from scinet.data.stream import BadSample, Order, SampleStream
from scinet.errors import ConfigError, DataError
from scinet.options import DataOptions, OnBadSample
from tests.scinet.conftest import MakeShards
from tests.scinet.data.failing_server import FailingServer

pytestmark = pytest.mark.timeout(60)

TIMEOUT_S = 1.5
NUM_SAMPLES = 23
SHARD = "train-000001.tar"
WRITTEN = Order(0, 0, lanes=1, shuffle_window=0)
SHUFFLED = Order(3, 1, lanes=4, shuffle_window=5)


@pytest.fixture
def folder(make_shards: MakeShards, tmp_path: Path) -> Path:
    return make_shards(NUM_SAMPLES, shard_samples=6, out=tmp_path / "set").directory


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[..., FailingServer]]:
    servers = []

    def start(**words: Any) -> FailingServer:
        servers.append(FailingServer(folder, **words))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def _forget_full_folders() -> Iterator[None]:
    yield
    shardcache._given_up.clear()


def _options(path: str, **changes: Any) -> DataOptions:
    return replace(DataOptions(path=path, timeout_s=TIMEOUT_S, retries=2), **changes)


def _ids(card: DataCard, options: DataOptions, order: Order = WRITTEN) -> list[str]:
    return [
        "bad" if isinstance(sample, BadSample) else sample.sample_id
        for sample in SampleStream(card, "train", order, options=options)
    ]


def _all_ids(number: int = NUM_SAMPLES) -> list[str]:
    return [f"train-{n:04d}" for n in range(number)]


def _read(path: str, order: Order = WRITTEN, **changes: Any) -> list[str]:
    options = _options(path, **changes)
    return _ids(sources.read_card(options), options, order)


def _refusal(path: str, **changes: Any) -> str:
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        _read(path, **changes)
    assert time.monotonic() - started < 2 * TIMEOUT_S + 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_samples_are_those_of_the_folder_when_they_come_by_http(
    folder: Path, serve: Callable[..., FailingServer]
) -> None:
    url = serve().url
    assert _read(url) == _read(f"{url}/") == _read(str(folder)) == _read(f"file://{folder}") == _all_ids()
    assert _read(url, SHUFFLED) == _read(str(folder), SHUFFLED)


@pytest.mark.parametrize("has_range", [True, False])
@pytest.mark.parametrize("fault", ["reset", "close"])
def test_stream_goes_on_at_its_byte_when_the_connection_drops(
    serve: Callable[..., FailingServer], fault: str, *, has_range: bool
) -> None:
    server = serve(has_range=has_range)
    server.faults[SHARD] = [(fault, 3000), (fault, 2500 if has_range else 5000)]
    before = retries.total()
    assert _read(server.url) == _all_ids()
    assert retries.total() - before == 2
    assert server.asked(SHARD) == [0, 3000, 5500 if has_range else 5000]


@pytest.mark.parametrize("fault", [("status", 500), ("status", 404), ("stall", 1000), ("stall", 0)])
def test_stream_goes_on_when_a_failing_source_recovers(
    serve: Callable[..., FailingServer], fault: tuple[str, int]
) -> None:
    server = serve()
    server.faults[SHARD] = [fault]
    server.faults[CARD_NAME] = [("status", 503)]
    assert _read(server.url) == _all_ids()


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (("stall", 0), "stalled for 1.5 s"),
        (("stall", 2000), "stalled for 1.5 s (at byte"),
        (("drip", 0.2), "stalled"),
        (("status", 500), "HTTP 500"),
        (("status", 404), "HTTP 404"),
        (("close", 0), "it ended early"),
        (("redirect", "file:///etc/passwd"), "HTTP 302"),
        (("redirect", "ftp://127.0.0.1/x"), "failed"),
    ],
)
def test_shard_is_named_in_time_when_it_fails_for_good(
    serve: Callable[..., FailingServer], fault: tuple[str, Any], told: str
) -> None:
    server = serve()
    server.always[SHARD] = fault
    message = _refusal(server.url)
    assert f"{server.url}/{SHARD}" in message
    assert told in message
    assert "data.timeout_s=1.5" in message


def test_card_is_named_in_time_when_it_stalls(serve: Callable[..., FailingServer]) -> None:
    server = serve()
    server.always[CARD_NAME] = ("stall", 10)
    assert f"{server.url}/{CARD_NAME}" in _refusal(server.url)


def test_server_is_named_when_nobody_listens(serve: Callable[..., FailingServer]) -> None:
    server = serve()
    server.close()
    assert server.url in _refusal(server.url)


@pytest.mark.parametrize("workers", [1, 2])
def test_stall_ends_in_an_error_when_a_loader_process_meets_it(
    serve: Callable[..., FailingServer], workers: int
) -> None:
    server = serve()
    options = _options(server.url, workers=workers)
    card = sources.read_card(options)
    server.always[SHARD] = ("stall", 100)
    started = time.monotonic()
    loader = DataLoader(SampleStream(card, "train", WRITTEN, options=options), batch_size=None, num_workers=workers)
    found = next(item for item in loader if isinstance(item, DataError))
    assert f"{server.url}/{SHARD}" in str(found)
    assert time.monotonic() - started < 20


def test_rest_of_a_shard_counts_as_bad_when_it_vanishes_and_bad_samples_are_skipped(
    serve: Callable[..., FailingServer],
) -> None:
    server = serve()
    server.always[SHARD] = ("status", 410)
    ids = _read(server.url, on_bad_sample=OnBadSample.skip, retries=0)
    assert ids == [*_all_ids()[:6], *["bad"] * 6, *_all_ids()[12:]]


def test_both_sizes_are_said_when_a_shard_was_replaced(folder: Path, serve: Callable[..., FailingServer]) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-700])
    message = _refusal(serve().url)
    assert SHARD in message
    assert "truncated or was replaced" in message


def _flip(path: Path) -> None:
    """Change a byte of an image, which leaves the tar as it was."""
    content = bytearray(path.read_bytes())
    content[600] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("is_cached", [False, True])
def test_checksum_is_said_when_a_shard_was_changed(
    folder: Path, serve: Callable[..., FailingServer], tmp_path: Path, *, is_cached: bool
) -> None:
    _flip(folder / SHARD)
    cache = str(tmp_path / "cache") if is_cached else ""
    message = _refusal(serve().url, cache_shards=cache)
    assert SHARD in message
    assert "SHA-256" in message
    assert not list((tmp_path / "cache").glob("*.part"))


def test_shards_are_downloaded_once_when_they_are_cached(
    folder: Path, serve: Callable[..., FailingServer], tmp_path: Path
) -> None:
    server = serve()
    server.faults[SHARD] = [("reset", 3000)]
    cache = str(tmp_path / "cache")
    assert _read(server.url, SHUFFLED, cache_shards=cache) == _read(str(folder), SHUFFLED)
    assert len([name for name, _ in server.requests if name.endswith(".tar")]) == 5
    server.requests.clear()
    assert _read(server.url, cache_shards=cache) == _all_ids()
    assert {name for name, _ in server.requests} == {CARD_NAME}
    hashes = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "cache").glob("*.tar")}
    assert len(hashes) == 4
    assert all(name == digest for name, digest in hashes.items())


def test_readers_of_one_machine_download_once_when_they_start_together(
    serve: Callable[..., FailingServer], tmp_path: Path
) -> None:
    server = serve()
    options = _options(server.url, cache_shards=str(tmp_path / "cache"))
    card = sources.read_card(options)
    results: list[list[str]] = []
    readers = [threading.Thread(target=lambda: results.append(_ids(card, options, SHUFFLED))) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(results) == 4
    assert all(ids == results[0] for ids in results)
    assert len([name for name, _ in server.requests if name.endswith(".tar")]) == 4


def test_shards_are_streamed_with_one_warning_when_the_cache_is_full(
    serve: Callable[..., FailingServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    cache = tmp_path / "cache"
    cache.mkdir()
    server = serve()
    card = sources.read_card(_options(server.url))
    for shard in card.split("train").shards:
        (cache / f".{shard.sha256}.tar.part").symlink_to(full)  # writing there is what writing to a full disk is
    caplog.set_level(logging.WARNING)
    assert _read(server.url, SHUFFLED, cache_shards=str(cache)) == _ids(card, _options(server.url), SHUFFLED)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert f"{cache} is full" in warnings[0]


def test_cache_folder_is_named_when_it_cannot_be_written(serve: Callable[..., FailingServer], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"data\.cache_shards=.*cannot be written"):
        _read(serve().url, cache_shards=str(tmp_path / "file" / "cache"))


def test_reader_goes_on_alone_when_the_holder_of_the_lock_stands_still(
    serve: Callable[..., FailingServer], tmp_path: Path
) -> None:
    import fcntl

    server = serve()
    card = sources.read_card(_options(server.url))
    shard = card.split("train").shards[1]
    with (tmp_path / f".{shard.sha256}.tar.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert _read(server.url, cache_shards=str(tmp_path), timeout_s=0.5) == _all_ids()


def test_pipe_is_refused_when_it_is_not_allowed(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.allow_pipe=true"):
        _read(f"pipe:cat {folder}")


def test_pipe_is_read_when_it_is_allowed(folder: Path) -> None:
    assert _read(f"pipe:cat {folder}", allow_pipe=True) == _all_ids()
    assert _read(f"pipe:cat {folder}/{{}} | cat", SHUFFLED, allow_pipe=True) == _read(str(folder), SHUFFLED)


@pytest.mark.parametrize(("command", "told"), [("sleep 30; cat", "stalled"), ("false", "status 1")])
def test_pipe_is_named_in_time_when_it_fails(folder: Path, command: str, told: str) -> None:
    del folder
    assert told in _refusal(f"pipe:{command} {{}}", allow_pipe=True, retries=0)


def test_name_in_a_card_reaches_no_shell_when_it_holds_a_command(folder: Path, tmp_path: Path) -> None:
    tree = json.loads((folder / CARD_NAME).read_text())
    tree["splits"]["train"]["shards"][0]["file"] = f"x; touch {tmp_path.name}-owned; cat x".replace("/", "")
    (folder / CARD_NAME).write_text(json.dumps(tree))
    _refusal(f"pipe:cd {tmp_path} && cat {folder}", allow_pipe=True, retries=0)
    assert not list(tmp_path.glob("*owned*"))


def test_fsspec_is_read_when_it_knows_the_scheme(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"/bucket/set/{path.name}", path.read_bytes())
    assert _read("memory://bucket/set", SHUFFLED) == _read(str(folder), SHUFFLED)
    memory.rm(f"/bucket/set/{SHARD}")
    assert f"memory://bucket/set/{SHARD}" in _refusal("memory://bucket/set")


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_package_is_named_when_the_driver_is_missing(scheme: str, package: str) -> None:
    with pytest.raises(ConfigError, match=rf"pip install {package}"):
        _read(f"{scheme}://bucket/set")


def test_scheme_is_named_when_nothing_reads_it() -> None:
    with pytest.raises(ConfigError, match="'gopher://'"):
        _read("gopher://host/set")


def test_cached_shard_is_fetched_again_when_a_bit_of_it_has_changed(
    serve: Callable[..., FailingServer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, cache = serve(), tmp_path / "cache"
    assert _read(server.url, cache_shards=str(cache)) == _all_ids()
    before = len(server.requests)
    assert _read(server.url, cache_shards=str(cache)) == _all_ids()
    assert len(server.requests) == before + 1, "only the card"
    path = next(cache.glob("*.tar"))
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    assert _read(server.url, cache_shards=str(cache)) == _all_ids()
    assert len(server.requests) == before + 3, "the card and the damaged shard"
    assert caplog.text.count(f"{path} is damaged: it is fetched again") == 1
    assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("http:/127.0.0.1/set", "it should begin with http://"),
        ("http://[::1/set", "is no address"),
        ("sftp://u:SECRET@host/set", "data.path=sftp://host/set: 'sftp://' cannot be read here: .*paramiko"),
    ],
)
def test_address_is_refused_when_it_cannot_be_opened(path: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        _read(path)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:p@h:1/a b/c?sig=S#x", "https://h:1/a b/c"),
        ("http://h?sig=a@b/c", "http://h"),
        ("s3://key:S@bucket/a", "s3://bucket/a"),
        ("data.path=https://h/a?sig=S", "data.path=https://h/a"),
        ("pipe:curl https://h/a?b", "pipe:curl https://h/a?b"),
        ("data/mine", "data/mine"),
    ],
)
def test_secrets_are_not_shown(url: str, shown: str) -> None:
    assert transports.shown(url) == shown


def test_user_is_sent_to_the_server_when_the_address_names_one(serve: Callable[..., FailingServer]) -> None:
    server = serve()
    assert len(_read(server.url.replace("http://", "http://me:p%40ss@"))) == NUM_SAMPLES
    assert server.headers[-1]["Authorization"] == "Basic " + base64.b64encode(b"me:p@ss").decode()


def test_answer_is_final_when_it_would_be_the_same_again(serve: Callable[..., FailingServer]) -> None:
    server = serve()
    server.always[CARD_NAME] = ("status", 403)
    assert "HTTP 403 Forbidden" in _refusal(server.url)
    assert server.asked(CARD_NAME) == [0]


def test_card_is_refused_when_a_checksum_could_lead_out_of_the_cache(
    folder: Path, serve: Callable[..., FailingServer]
) -> None:
    tree = json.loads((folder / CARD_NAME).read_text())
    tree["splits"]["train"]["shards"][0]["sha256"] = "../../etc/x"
    (folder / CARD_NAME).write_text(json.dumps(tree))
    assert "SHA-256" in _refusal(serve().url)


def test_no_secret_of_a_url_is_said_when_it_fails(serve: Callable[..., FailingServer]) -> None:
    server = serve()
    server.always[CARD_NAME] = ("status", 403)
    message = _refusal(f"{server.url}?token=secret")
    assert "secret" not in message
