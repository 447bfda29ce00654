"""Figures pushed to a gateway, for runs that Prometheus cannot reach or that end before it comes."""

from __future__ import annotations

import http.client
import logging
import threading
import urllib.request
from urllib.parse import quote

from scinet.data import transports

_LONGEST_S = 5.0

_log = logging.getLogger(__name__)


class Pusher:
    """Pushes the newest text, from a thread of its own, in which a gateway may be slow or gone."""

    def __init__(self, gateway: str, run: str, *, refresh_s: float) -> None:
        """Name the group that is replaced at each push: job ``scinet``, and the run.

        Args:
            gateway: its URL.
            run: name of the run.
            refresh_s: time between two pushes.
        """
        self._url = f"{gateway.rstrip('/')}/metrics/job/scinet/run/{quote(run, safe='')}"
        self._refresh_s, self._text = refresh_s, ""
        self._has_failed = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="push", daemon=True)

    def publish(self, text: str) -> None:
        """Push a text from now on."""
        self._text = text

    def start(self) -> None:
        """Begin to push."""
        self._thread.start()

    def close(self, patience_s: float) -> None:
        """Push once more, if the gateway answers in time."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(patience_s)

    def _run(self) -> None:
        is_over = False
        while not is_over:
            is_over = self._ended.wait(self._refresh_s)
            try:
                request = urllib.request.Request(self._url, self._text.encode(), method="PUT")
                with urllib.request.urlopen(request, timeout=_LONGEST_S):
                    pass
            except (OSError, http.client.HTTPException, ValueError) as error:
                if not self._has_failed:
                    shown = transports.shown(self._url)
                    _log.warning("figures are not pushed to %s (%s): it is tried again", shown, error)
                self._has_failed = True
