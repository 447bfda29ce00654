"""What endpoints say is read within limits, whoever answers there."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scinet.top import scrape as scraping
from scinet.top.scrape import Figures, scrape, targets
from tests.scinet.top.conftest import FIGURES, Serve, ok

NAMES = ("scinet_rank_up", "scinet_world_size")
LIMIT_S = 0.5
PATIENCE_S = 20  # generous: of a busy machine


def ask(port: int) -> Figures:
    return scrape([("127.0.0.1", port)], NAMES, limit_s=LIMIT_S)


def test_wanted_samples_are_returned_with_their_labels(serve: Serve) -> None:
    figures = ask(serve(ok(FIGURES)))
    assert figures
    assert figures.value("scinet_world_size") == 2
    assert figures.by("scinet_rank_up", "rank") == {"0": 1, "1": 0}
    assert figures.labels("scinet_rank_up", rank="1")["host"] == "beta"
    assert figures.value("scinet_train_steps_total") is None


def test_endpoints_of_several_ranks_are_put_together(serve: Serve) -> None:
    ports = [serve(ok(f'scinet_rank_up{{rank="{rank}"}} 1\n')) for rank in range(3)]
    figures = scrape([("127.0.0.1", port) for port in ports], NAMES, limit_s=LIMIT_S)
    assert set(figures.by("scinet_rank_up", "rank")) == {"0", "1", "2"}


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x00\xff" * 1000,
        b"HTTP/1.0 500 No\r\n\r\nscinet_world_size 2\n",
        b"HTTP/1.0 200 OK\r\nscinet_world_size 2\n",
        ok("scinet_world_size"),
        ok("scinet_world_size two\n"),
        ok('scinet_rank_up{rank="0" 1\n'),
        ok('scinet_rank_up{rank="' + '\\"' * 1_000_000 + '"} 1\n'),
        ok("scinet_world_size NaN\n"),
        ok(b"scinet_world_size 2\n" * 300_000),  # more than is read
    ],
)
def test_nothing_is_returned_when_the_answer_is_none(serve: Serve, answer: bytes) -> None:
    started = time.monotonic()
    assert not ask(serve(answer))
    assert time.monotonic() - started < PATIENCE_S


def test_redirects_are_not_followed(serve: Serve) -> None:
    elsewhere = serve(ok(FIGURES))
    assert not ask(serve(f"HTTP/1.0 302 Found\r\nLocation: http://127.0.0.1:{elsewhere}/metrics\r\n\r\n".encode()))


@pytest.fixture
def talk() -> Iterator[Callable[[bytes], int]]:
    """``talk(piece)``: take a connection and send a piece every 20 ms, for ever."""
    over = threading.Event()
    listening = socket.create_server(("127.0.0.1", 0))
    threads = []

    def begin(piece: bytes) -> int:
        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                while not over.wait(0.02):
                    try:
                        connection.sendall(piece)
                    except OSError:
                        return

        threads.append(threading.Thread(target=serve, daemon=True))
        threads[-1].start()
        return int(listening.getsockname()[1])

    yield begin
    over.set()
    for thread in threads:
        thread.join()
    listening.close()


@pytest.mark.parametrize("piece", [b"", b"H", b"HTTP/1.0 200 OK\r\n\r\n" + b"scinet_world_size 2\n" * 9999])
def test_time_is_limited_when_an_answer_never_ends(talk: Callable[[bytes], int], piece: bytes) -> None:
    started = time.monotonic()
    assert not ask(talk(piece))
    assert time.monotonic() - started < PATIENCE_S


def test_nothing_is_returned_when_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    assert not ask(port)
    assert not scrape([("no-such-host.invalid", 80)], NAMES, limit_s=LIMIT_S)


@given(st.text(alphabet='scinet_world_size{}="\\,# \n1eNa\x00', max_size=60))
def test_no_answer_raises(text: str) -> None:
    for line in (text, f"scinet_world_size{text}", f"scinet_rank_up{{{text}}} 1"):
        scraping._parse(line.encode(), NAMES)


def test_targets_are_hosts_and_ports(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps([{"targets": ["127.0.0.1:80", "[::1]:81"]}, {"targets": ["node-1.example:82"]}]))
    assert targets(path) == [("127.0.0.1", 80), ("::1", 81), ("node-1.example", 82)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[{",
        "[" * 200_000,
        "7",
        '{"targets": ["127.0.0.1:80"]}',
        '[{"targets": 7}]',
        '[{"labels": {}}]',
        "\udcff",
        *(
            json.dumps([{"targets": [target]}])
            for target in (
                *("file:///etc/passwd", "http://127.0.0.1:80", "127.0.0.1:80/secret", "user@127.0.0.1:80", "127.0.0.1"),
                *("127.0.0.1:0", "127.0.0.1:99999", "127.0.0.1:80\r\nX: y", "a b:80", "", 80, None, ["127.0.0.1:80"]),
            )
        ),
    ],
)
def test_no_target_is_returned_when_a_file_names_anything_else(tmp_path: Path, text: str) -> None:
    path = tmp_path / "one.json"
    path.write_text(text, errors="surrogateescape")
    assert targets(path) == []


def test_no_target_is_returned_when_there_is_no_file_or_a_huge_one(tmp_path: Path) -> None:
    assert targets(tmp_path / "none.json") == []
    path = tmp_path / "huge.json"
    path.write_text(json.dumps([{"targets": ["127.0.0.1:80"], "padding": "x" * (2 << 20)}]))
    assert targets(path) == []
