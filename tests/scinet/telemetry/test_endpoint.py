"""``/metrics``: what clients of all manners get, and that none of them keeps another waiting."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from scinet.telemetry import endpoint as endpoint_module
from scinet.telemetry.endpoint import Endpoint

TEXT = "# HELP a first\n# TYPE a gauge\na 1.0\n"


@pytest.fixture
def served() -> Iterator[Endpoint]:
    endpoint = Endpoint("127.0.0.1", 0)
    endpoint.publish(TEXT)
    endpoint.start()
    with contextlib.closing(endpoint):
        yield endpoint


def _get(endpoint: Endpoint, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://{endpoint.target}{path}", timeout=20) as answer:
        return answer.read().decode()


def _say(endpoint: Endpoint, request: bytes) -> bytes:
    """Send bytes as they are, and return all that comes back."""
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=20) as client:
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(65536), b""))


def test_text_is_served_as_prometheus_expects_it(served: Endpoint) -> None:
    with urllib.request.urlopen(f"http://{served.target}/metrics", timeout=20) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert answer.read().decode() == TEXT
    served.publish(TEXT + "# more\n")
    assert _get(served, "/metrics?name=a") == TEXT + "# more\n"


def test_head_gives_the_size_alone(served: Endpoint) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    connection.request("HEAD", "/metrics", headers={"Host": "elsewhere.example"})
    answer = connection.getresponse()
    assert (answer.status, int(answer.headers["Content-Length"]), answer.read()) == (200, len(TEXT), b"")
    # a client of HTTP looks for no body after a HEAD, and would take it for the next answer
    for path in (b"/metrics", b"/x"):
        assert served._answer(b"HEAD " + path + b" HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET / HTTP/1.1", b"404"),
        (b"GET /metrics/x HTTP/1.0", b"404"),
        (b"HEAD /x HTTP/1.1", b"404"),
        (b"GET http://[ HTTP/1.1", b"404"),
        (b"POST /metrics HTTP/1.1", b"405"),
        (b"DELETE /metrics HTTP/1.1", b"405"),
        (b"GET /metrics", b"400"),
        (b"\xff\x00\x16\x03", b"400"),
        (b"", b"400"),
        (b"A" * 20000, b"400"),
        (b"GET http://somewhere:1/metrics HTTP/1.1", b"200"),
    ],
)
def test_request_gets_its_answer_when_it_is_odd(served: Endpoint, request_line: bytes, status: bytes) -> None:
    with contextlib.suppress(ConnectionResetError):  # of one whose rest nobody reads
        answer = _say(served, request_line + b"\r\nHost: x\r\n\r\n")
        assert answer.split(b" ")[1] == status
    assert _get(served) == TEXT


def test_request_is_read_when_it_comes_in_pieces(served: Endpoint) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        for piece in (b"GET /met", b"rics HTTP/1.1\r\nHo", b"st: x\r\n\r", b"\n"):
            client.sendall(piece)
            assert _get(served) == TEXT, "others do not wait"
        assert client.recv(65536).startswith(b"HTTP/1.1 200")


def test_every_one_of_a_hundred_clients_is_answered_while_others_are_silent_or_slow() -> None:
    endpoint = Endpoint("127.0.0.1", 0)
    endpoint.publish("x" * 8_000_000)  # more than sockets buffer
    endpoint.start()
    with contextlib.closing(endpoint), contextlib.ExitStack() as held:
        for number in range(20):
            idle = held.enter_context(socket.create_connection(("127.0.0.1", endpoint.port), timeout=20))
            if number % 2:
                idle.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")  # and takes nothing
        got: list[int] = []
        threads = [threading.Thread(target=lambda: got.append(len(_get(endpoint)))) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == [8_000_000] * 100


def test_client_is_let_go_when_it_says_nothing_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "_LONGEST_S", 0.2)
    monkeypatch.setattr(endpoint_module, "_LOOKS_EVERY_S", 0.05)
    endpoint = Endpoint("127.0.0.1", 0)
    endpoint.start()
    with contextlib.closing(endpoint):
        assert _say(endpoint, b"GET /met") == b""


def test_oldest_clients_make_room_when_there_are_too_many(served: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "_MOST_CLIENTS", 4)
    with contextlib.ExitStack() as held:
        idle = [held.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=20)) for _ in range(8)]
        assert _get(served) == TEXT
        assert idle[0].recv(1) == b"", "let go"


def test_nothing_listens_after_the_end(served: Endpoint) -> None:
    idle = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    served.close()
    with pytest.raises(urllib.error.URLError):
        _get(served)
    with idle:
        assert idle.recv(1) == b""


@pytest.fixture
def outlived() -> Iterator[Endpoint]:
    """An endpoint that answers, in a process whose child lives on, as a loader process may."""
    endpoint = Endpoint("127.0.0.1", 0)
    endpoint.start()
    mine, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        theirs.send(b"here")
        theirs.recv(1)  # until the parent lets go
        os._exit(0)
    assert mine.recv(4) == b"here"
    yield endpoint
    mine.send(b"x")
    os.waitpid(child, 0)


@pytest.mark.timeout(60)
def test_end_comes_at_once_when_a_child_lives_on(outlived: Endpoint) -> None:
    started = time.monotonic()
    outlived.close()
    assert time.monotonic() - started < endpoint_module._LONGEST_S / 2, "the thread was woken, not given up"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", outlived.port), timeout=20)


def test_port_is_free_again_when_a_child_outlives_a_killed_run(outlived: Endpoint) -> None:
    outlived._listener.close()  # as the kernel does with the sockets of a process that is killed
    with contextlib.closing(Endpoint("127.0.0.1", outlived.port)):
        pass
    outlived.close()


def test_second_one_is_refused_when_the_port_is_taken(served: Endpoint) -> None:
    with pytest.raises(OSError, match="in use"):
        Endpoint("127.0.0.1", served.port)


def test_address_is_written_in_brackets_when_it_is_of_version_six() -> None:
    try:
        endpoint = Endpoint("::1", 0)
    except OSError:
        pytest.skip("this machine has no IPv6")
    endpoint.publish(TEXT)
    endpoint.start()
    with contextlib.closing(endpoint):
        assert endpoint.target == f"[::1]:{endpoint.port}"
        assert _get(endpoint) == TEXT
