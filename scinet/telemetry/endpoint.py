"""``/metrics`` over HTTP: answers with bytes that are ready, from one thread that waits for no client.

It keeps rank 0's interpreter for some tens of microseconds a scrape, whoever asks, how slowly and however many.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import selectors
import socket
import threading
import time
import weakref
from dataclasses import dataclass, field
from urllib.parse import urlsplit

PATH = "/metrics"
_PLAIN = "text/plain; charset=utf-8"
_FIGURES = "text/plain; version=0.0.4; charset=utf-8"
_LONGEST_S = 10.0  # from a client's first sign to the last byte it takes
_LOOKS_EVERY_S = 1.0
_MOST_CLIENTS = 256
_LARGEST_REQUEST = 16 * 2**10
_ANYWHERE = ("0.0.0.0", "::")

_log = logging.getLogger(__name__)


@dataclass
class _Client:
    """One connection: what it has asked so far, what it is still to be told."""

    socket: socket.socket
    deadline: float
    asked: bytearray = field(default_factory=bytearray)
    answer: memoryview | None = None

    def hang_up(self) -> None:
        """End it, also where a loader process has inherited it; what was sent still arrives."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class Endpoint:
    """Serves one text."""

    def __init__(self, host: str, port: int) -> None:
        """Listen; :meth:`start` answers.

        Raises:
            OSError: if the address is not this machine's, or taken.
        """
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self._listener = socket.create_server(address, family=family, backlog=_MOST_CLIENTS)
        self._listener.setblocking(False)
        self._host, self.port = host, int(self._listener.getsockname()[1])
        self._body = b""
        self._waker, self._woken = socket.socketpair()
        self._clients: dict[int, _Client] = {}
        self._thread = threading.Thread(target=self._serve, name="metrics", daemon=True)
        _listening.add(self)

    @property
    def target(self) -> str:
        """Host and port at which others find it."""
        host = platform.node() if self._host in _ANYWHERE else self._host
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def publish(self, text: str) -> None:
        """Serve a text from now on."""
        self._body = text.encode()

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stop listening, also where another process has inherited the socket, and let go of all clients."""
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")  # closing it would wake nobody while a loader process holds it too
        if self._thread.is_alive():
            self._thread.join(_LONGEST_S)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.forget()
        for client in list(self._clients.values()):
            client.hang_up()

    def forget(self) -> None:
        """Let go of the sockets in this process that it shares with those it has started."""
        _listening.discard(self)
        for shared in (self._listener, self._waker, self._woken):
            shared.close()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select(_LOOKS_EVERY_S if self._clients else None):
                    if key.fileobj is self._woken:
                        return
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    elif key.fd in self._clients:
                        self._attend(self._clients[key.fd], selector)
                now = time.monotonic()
                for client in [client for client in self._clients.values() if client.deadline < now]:
                    self._drop(client, selector)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptor is left, for instance: the listener stays readable
            time.sleep(_LOOKS_EVERY_S / 10)
            return
        connection.setblocking(False)
        if len(self._clients) == _MOST_CLIENTS:
            self._drop(next(iter(self._clients.values())), selector)
        client = _Client(connection, time.monotonic() + _LONGEST_S)
        self._clients[connection.fileno()] = client
        selector.register(connection, selectors.EVENT_READ)

    def _attend(self, client: _Client, selector: selectors.BaseSelector) -> None:
        """Read what a client asks, or send what it takes."""
        try:
            if client.answer is None:
                received = client.socket.recv(_LARGEST_REQUEST)
                client.asked += received
                is_whole = b"\r\n\r\n" in client.asked or b"\n\n" in client.asked
                if not is_whole and received and len(client.asked) < _LARGEST_REQUEST:
                    return
                if not is_whole and not received:
                    self._drop(client, selector)
                    return
                client.answer = memoryview(self._answer(bytes(client.asked)))
                selector.modify(client.socket, selectors.EVENT_WRITE)
            client.answer = client.answer[client.socket.send(client.answer) :]
            if not client.answer:
                self._drop(client, selector)
        except BlockingIOError:
            return
        except OSError:  # it went away
            self._drop(client, selector)

    def _drop(self, client: _Client, selector: selectors.BaseSelector) -> None:
        selector.unregister(client.socket)
        del self._clients[client.socket.fileno()]
        client.hang_up()

    def _answer(self, asked: bytes) -> bytes:
        words = asked.partition(b"\n")[0].decode("latin-1").split()
        if len(words) != 3 or not words[2].startswith("HTTP/"):
            return _response("400 Bad Request", b"this is no HTTP request\n")
        method, target, _ = words
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", b"only GET and HEAD\n", "Allow: GET, HEAD\r\n")
        try:
            is_found = urlsplit(target).path == PATH
        except ValueError:
            is_found = False
        if not is_found:
            return _response("404 Not Found", f"a run of scinet serves {PATH}\n".encode(), is_head=method == "HEAD")
        return _response("200 OK", self._body, kind=_FIGURES, is_head=method == "HEAD")


def _response(status: str, body: bytes, more: str = "", *, kind: str = _PLAIN, is_head: bool = False) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{more}\r\n"
    )
    return head.encode() + (b"" if is_head else body)


_listening: weakref.WeakSet[Endpoint] = weakref.WeakSet()


def _forget_all() -> None:
    """Keep the port from outliving the run in a loader process."""
    for endpoint in list(_listening):
        endpoint.forget()


os.register_at_fork(after_in_child=_forget_all)
