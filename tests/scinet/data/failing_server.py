"""A local HTTP server over a folder that fails as it is told: stalls, resets, truncates, refuses, ignores Range."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FailingServer:
    """Serves ``folder``; ``faults[name]`` is the list of what happens to the next requests of a file.

    A fault is ``("status", code)``, ``("stall", bytes)``, ``("reset", bytes)``, ``("close", bytes)`` (a transfer that
    ends early), ``("drip", seconds a byte)`` or ``("redirect", url)``; afterwards requests are answered as they should.
    """

    def __init__(self, folder: Path, *, has_range: bool = True) -> None:
        self.folder, self.has_range = folder, has_range
        self.faults: dict[str, list[tuple[str, Any]]] = defaultdict(list)
        self.always: dict[str, tuple[str, Any]] = {}
        self.requests: list[tuple[str, int]] = []  # file and first byte
        self.headers: list[dict[str, str]] = []
        self.stopping = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/set"

    def close(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def asked(self, name: str) -> list[int]:
        """Return the first bytes that a file was asked for, request by request."""
        return [first for file, first in self.requests if file == name]


def _handler(server: FailingServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            asked = int(self.headers.get("Range", "bytes=0-")[6:].rstrip("-"))
            server.requests.append((name, asked))
            server.headers.append(dict(self.headers))
            queue = server.faults[name]
            fault, value = queue.pop(0) if queue else server.always.get(name, ("", 0))
            path = server.folder / name
            if fault == "status" or not path.is_file():
                self.send_error(value or 404)
                return
            if fault == "redirect":
                self.send_response(302)
                self.send_header("Location", value)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = path.read_bytes()
            first = asked if server.has_range else 0
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - first))
            self.end_headers()
            self._send(content[first:], fault, value)

        def _send(self, content: bytes, fault: str, value: Any) -> None:
            try:
                if fault == "drip":
                    for place in range(len(content)):
                        self.wfile.write(content[place : place + 1])
                        if server.stopping.wait(value):
                            return
                    return
                self.wfile.write(content[:value] if fault else content)
                self.wfile.flush()
            except OSError:
                return  # the reader had enough
            if fault:
                self.close_connection = True
            if fault == "stall":
                server.stopping.wait(60)
            elif fault == "reset":
                time.sleep(0.05)  # let what was sent arrive: a reset throws away what the peer has not read
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    return Handler
