"""Opens what a run tells beside the terminal: its rows, and its figures for Prometheus."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Callable
from types import TracebackType

from scinet import rundir
from scinet.distributed import Ranks, gather_objects
from scinet.errors import ConfigError, Preempted
from scinet.notes import Notes
from scinet.options import Method, Options, Prometheus
from scinet.rundir import RunDirectory
from scinet.telemetry import weights_and_biases
from scinet.telemetry.endpoint import PATH, Endpoint
from scinet.telemetry.exchange import Exchange
from scinet.telemetry.figures import Figures, RunFigures
from scinet.telemetry.observer import Observer, Standing
from scinet.telemetry.push import Pusher
from scinet.telemetry.rows import Background, Fan, MetricsLog
from scinet.telemetry.weights_and_biases import WeightsAndBiases

_MOST_PORT = 65535
_PATIENCE_S = 20.0
_HURRY_S = 2.0  # of a run that fails: the other ranks wait to be told

_log = logging.getLogger(__name__)


class Station(contextlib.AbstractContextManager["Station"]):
    """What takes the rows and figures of one run, from before its first step to its end."""

    def __init__(self, options: Options, ranks: Ranks, directory: RunDirectory) -> None:
        """Listen where the options say, so that an address that is taken is said at once. Collective.

        Raises:
            ConfigError: on all ranks alike, if one cannot listen.
        """
        self._options, self._ranks, self._directory = options, ranks, directory
        # the zero-shot classifier takes no step
        self._mode = Prometheus.off if options.method is Method.zero_shot else options.telemetry.prometheus
        self.log = MetricsLog(directory.metrics if ranks.is_first else None)
        self.rows = Fan(self.log)
        self.observer = _figures(self._mode, options, ranks)
        self._endpoint: Endpoint | None = None
        self._pusher: Pusher | None = None
        self._exchange: Exchange | None = None
        wants_wandb = options.telemetry.wandb and ranks.is_first
        problem = (weights_and_biases.missing() if wants_wandb else "") or self._listen()
        problems = [found for found in gather_objects([problem], ranks) if found]
        if problems:
            self._close(_HURRY_S)
            raise ConfigError(problems[0])

    def _listen(self) -> str:
        """Open this rank's endpoint if it has one, and return why that failed."""
        telemetry, ranks = self._options.telemetry, self._ranks
        is_every_ranks = self._mode is Prometheus.every_rank
        if not is_every_ranks and not (self._mode is Prometheus.first_rank and ranks.is_first):
            return ""
        port = telemetry.port and telemetry.port + is_every_ranks * int(os.environ.get("LOCAL_RANK", "0"))
        remedy = "set another one, or telemetry.port=0 for a free one"
        if port > _MOST_PORT:
            return f"rank {ranks.rank} would listen on port {port}, telemetry.port is {telemetry.port}: {remedy}"
        try:
            self._endpoint = Endpoint(telemetry.host, port)
        except (OSError, UnicodeError) as error:
            return (
                f"rank {ranks.rank} cannot listen on telemetry.host={telemetry.host}, port {port} ({_reason(error)}; "
                f"telemetry.port={telemetry.port}): {remedy}, or telemetry.prometheus=off"
            )
        return ""

    def begin(self, standing: Standing, say: Callable[[str], None]) -> None:
        """Go on from where the run stands: drop the rows after it, tell figures and rows from now on. Collective."""
        num_rows = len(self.log.rows)
        self.log.rewind(standing.steps)
        self._withdraw()  # what it left behind when it was killed
        if self._ranks.is_first:
            self._open_sinks(standing, num_told=num_rows - len(self.log.rows))
        if not isinstance(self.observer, Figures):
            return
        self.observer.stand(standing)
        if isinstance(self.observer, RunFigures):
            for row in self.log.rows:
                self.observer.write(row)
            self.rows.add(self.observer)
        self._exchange = self._begin_exchange(self.observer)
        self._announce(say)

    def _open_sinks(self, standing: Standing, *, num_told: int) -> None:
        options, directory = self._options, self._directory
        if options.telemetry.tensorboard:
            from scinet.telemetry.tensorboard import TensorBoard

            self.rows.add(TensorBoard(directory.tensorboard, standing.steps))
        if options.telemetry.wandb:
            make = functools.partial(WeightsAndBiases, options, directory, num_told)
            self.rows.add(Background(WeightsAndBiases.name, make))

    def _begin_exchange(self, figures: Figures) -> Exchange:
        telemetry, ranks = self._options.telemetry, self._ranks
        if self._mode is Prometheus.push and ranks.is_first:
            self._pusher = Pusher(telemetry.push_gateway, self._options.name, refresh_s=telemetry.refresh_s)
        outlet = self._endpoint or self._pusher
        exchange = Exchange(
            figures.registry,
            ranks,
            Notes(ranks),
            outlet.publish if outlet else lambda _: None,
            refresh_s=telemetry.refresh_s,
            shares=self._mode is not Prometheus.every_rank,
        )
        exchange.start()
        if outlet:
            outlet.start()
        return exchange

    def _announce(self, say: Callable[[str], None]) -> None:
        """Write where Prometheus finds the run. Collective."""
        targets = gather_objects([self._endpoint.target if self._endpoint else ""], self._ranks)
        found = [(rank, target) for rank, target in enumerate(targets) if target]
        if not self._ranks.is_first or not found:
            return
        has_ranks = self._mode is Prometheus.every_rank
        entries = [
            {"targets": [target], "labels": {"run": self._options.name} | ({"rank": str(rank)} if has_ranks else {})}
            for rank, target in found
        ]
        for _, target in found:
            say(f"metrics: http://{target}{PATH}")
        try:
            self._directory.targets.parent.mkdir(exist_ok=True)
            rundir.write_text(self._directory.targets, json.dumps(entries) + "\n")
        except OSError as error:  # a full disk does not keep a run from going on
            _log.warning("%s cannot be written (%s): Prometheus must be told", self._directory.targets, error.strerror)

    def _withdraw(self) -> None:
        """Let Prometheus forget the run."""
        if self._ranks.is_first:
            with contextlib.suppress(OSError):
                self._directory.targets.unlink()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the last figures, stop listening and close the sinks; one that failed is left for Prometheus to miss."""
        if error is None or isinstance(error, Preempted | KeyboardInterrupt):
            self._withdraw()
        self._close(_PATIENCE_S if kind is None else _HURRY_S)

    def _close(self, patience_s: float) -> None:
        if self._exchange:
            self._exchange.close()
        if self._endpoint:
            self._endpoint.close()
        if self._pusher:
            self._pusher.close(patience_s)
        self.rows.close(patience_s)


def _reason(error: OSError | UnicodeError) -> str:
    """Return the system's words for why it cannot listen, without Python's."""
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return str(getattr(error, "strerror", None) or error)


def _figures(mode: Prometheus, options: Options, ranks: Ranks) -> Observer:
    if mode is Prometheus.off:
        return Observer()
    return RunFigures(options, ranks) if ranks.is_first else Figures(ranks)
