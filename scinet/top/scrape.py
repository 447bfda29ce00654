"""One look at a run's metrics endpoints. Who wrote their addresses and their answers may be a stranger."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from scinet.top.rows import LARGEST

_MOST_TARGETS = 64
_LARGEST_FILE = 1 << 20
_LARGEST_ANSWER = 4 << 20
_LONGEST_LINE = 1024  # the parser's time grows with its square
_MOST_LINES = 10_000
_TARGET = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([A-Za-z0-9.-]{1,253})):([0-9]{1,5})")


@dataclass(frozen=True)
class Sample:
    """One figure with its labels."""

    name: str
    labels: Mapping[str, str]
    value: float


class Figures:
    """What the endpoints of one run said at one moment; empty if none answered."""

    def __init__(self, samples: Sequence[Sample], at_s: float) -> None:
        """Keep the samples that are numbers, and the time of a monotonic clock."""
        self.at_s = at_s
        self._samples: dict[str, list[Sample]] = {}
        for sample in samples:
            if -LARGEST <= sample.value <= LARGEST:
                self._samples.setdefault(sample.name, []).append(sample)

    def __bool__(self) -> bool:
        """Whether anything was said."""
        return bool(self._samples)

    def value(self, name: str, **labels: str) -> float | None:
        """Return the first sample of a name that has these labels, or None."""
        wanted = labels.items()
        return next((each.value for each in self._samples.get(name, []) if wanted <= each.labels.items()), None)

    def by(self, name: str, label: str) -> dict[str, float]:
        """Return the samples of a name, by one of their labels."""
        return {each.labels[label]: each.value for each in self._samples.get(name, []) if label in each.labels}

    def labels(self, name: str, **labels: str) -> Mapping[str, str]:
        """Return all labels of the first sample that has these."""
        wanted = labels.items()
        return next((each.labels for each in self._samples.get(name, []) if wanted <= each.labels.items()), {})


def targets(path: Path) -> list[tuple[str, int]]:
    """Return the hosts and ports that a file in Prometheus' ``file_sd`` format names: nothing else is ever opened."""
    if not path.is_file():  # a pipe would never open
        return []
    try:
        with path.open("rb") as file:
            groups = json.loads(file.read(_LARGEST_FILE))
        named = [target for group in groups for target in group["targets"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    matches = [_TARGET.fullmatch(target) for target in named[:_MOST_TARGETS] if isinstance(target, str)]
    found = [(match[1] or match[2], int(match[3])) for match in matches if match]
    return [(host, port) for host, port in found if 0 < port < 1 << 16]


def scrape(addresses: Sequence[tuple[str, int]], names: Collection[str], *, limit_s: float) -> Figures:
    """Ask all endpoints at once and return what came within the time; what is silent or talks nonsense adds nothing.

    Args:
        addresses: hosts and ports.
        names: of the samples that are wanted.
        limit_s: for all of it.
    """
    answers: list[list[Sample]] = [[] for _ in addresses]

    def ask(place: int) -> None:
        answers[place] = _parse(_get(*addresses[place], limit_s=limit_s), names)

    # daemons: a name server that does not answer keeps one waiting beyond all limits
    threads = [threading.Thread(target=ask, args=(place,), daemon=True) for place in range(len(addresses))]
    end = time.monotonic() + limit_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()) + 0.1)
    return Figures([sample for answer in list(answers) for sample in answer], time.monotonic())


def _get(host: str, port: int, *, limit_s: float) -> bytes:
    """Return the body of ``/metrics``: plain HTTP/1.0, so no redirect, no compression and no chunks can follow."""
    end, answer = time.monotonic() + limit_s, b""
    try:
        with socket.create_connection((host, port), timeout=limit_s) as connection:
            connection.sendall(f"GET /metrics HTTP/1.0\r\nHost: {host}:{port}\r\nAccept: text/plain\r\n\r\n".encode())
            while (left_s := end - time.monotonic()) > 0 and len(answer) <= _LARGEST_ANSWER:
                connection.settimeout(left_s)
                piece = connection.recv(1 << 16)
                if not piece:
                    head, _, body = answer.partition(b"\r\n\r\n")
                    return body if re.match(rb"HTTP/1\.[01] 200\b", head) else b""
                answer += piece
    except (OSError, UnicodeError):
        pass
    return b""


def _parse(body: bytes, names: Collection[str]) -> list[Sample]:
    lines = (line for line in body.decode(errors="replace").split("\n") if len(line) <= _LONGEST_LINE)
    wanted = islice((line for line in lines if re.split("[{ ]", line, maxsplit=1)[0] in names), _MOST_LINES)
    try:
        families = list(text_string_to_metric_families("\n".join(wanted)))
    except (ValueError, LookupError):  # its parser meets nonsense with either
        return []
    return [Sample(each.name, each.labels, each.value) for family in families for each in family.samples]
