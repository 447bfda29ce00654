"""One rank of the test in which every rank serves its own figures.

Usage, under torchrun: worker_telemetry.py OUT
"""

from __future__ import annotations

import json
import socket
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

from scinet.distributed import from_first_rank, gather_objects, initialise, shut_down, wait_for_all
from scinet.errors import ConfigError
from scinet.options import Options, Prometheus, TelemetryOptions
from scinet.rundir import RunDirectory
from scinet.telemetry.observer import Standing
from scinet.telemetry.station import Station


def main(out: Path) -> None:
    ranks = initialise(120)
    options = replace(Options(), telemetry=TelemetryOptions(prometheus=Prometheus.every_rank))
    directory = RunDirectory(out)
    targets, texts = [], []
    with Station(options, ranks, directory) as station:
        station.begin(Standing(0, 10, 0, 0, 0, 0), lambda _: None)
        if ranks.is_first:
            targets = json.loads(directory.targets.read_text())
            for entry in targets:
                with urllib.request.urlopen(f"http://{entry['targets'][0]}/metrics", timeout=60) as answer:
                    texts.append(answer.read().decode())
        wait_for_all(ranks)
    refusal = ""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = from_first_rank(lambda: taken.getsockname()[1], ranks)
        try:
            Station(replace(options, telemetry=replace(options.telemetry, port=port - 1)), ranks, directory)
        except ConfigError as error:
            refusal = str(error)
        refusals = gather_objects([refusal], ranks)
    if ranks.is_first:
        seen = {"targets": targets, "texts": texts, "refusals": refusals, "taken": port}
        (out / "seen.json").write_text(json.dumps(seen))
    shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
