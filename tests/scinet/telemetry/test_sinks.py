"""Rows reach every sink, a sink that fails ends nothing, and a resumed run goes on where it stands."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import struct
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c
from wandb.proto.wandb_internal_pb2 import Record

from scinet.distributed import Ranks
from scinet.errors import ConfigError, Preempted, TrainingError
from scinet.options import Method, Options, Prometheus, TelemetryOptions
from scinet.rundir import RunDirectory
from scinet.telemetry import weights_and_biases
from scinet.telemetry.observer import Standing
from scinet.telemetry.push import Pusher
from scinet.telemetry.rows import Background, Fan, MetricsLog
from scinet.telemetry.station import Station
from scinet.telemetry.tensorboard import TensorBoard

ALONE = Ranks(0, 1, torch.device("cpu"))
QUIET = TelemetryOptions(prometheus=Prometheus.off)


def _standing(step: int) -> Standing:
    return Standing(step, 70, 0, 16 * step, 0, 0)


def _row(step: int) -> dict[str, Any]:
    return {"step": step, "loss/total": 1 / step, "pseudo_recall": None, "epoch": 0}


def _carry_out(options: Options, folder: Path, first: int, last: int) -> None:
    """Go on from a step to another, as a run does that is started in a folder."""
    with Station(options, ALONE, RunDirectory(folder)) as station:
        station.begin(_standing(first - 1), lambda _: None)
        for step in range(first, last + 1):
            station.rows.write(_row(step))


def _events(folder: Path) -> list[Event]:
    """Read TensorBoard's files in its order, and check their sums."""
    events = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            content = data[12 : 12 + size]
            sums = struct.unpack("<I", data[8:12]) + struct.unpack("<I", data[12 + size : 16 + size])
            assert sums == (masked_crc32c(data[:8]), masked_crc32c(content))
            events.append(Event.FromString(content))
            data = data[16 + size :]
    return events


def _shown(events: list[Event]) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: a session's start discards what stands at its step and after."""
    shown: dict[str, list[tuple[int, float]]] = {}
    for event in events:
        if event.HasField("session_log"):
            shown = {tag: [pair for pair in pairs if pair[0] < event.step] for tag, pairs in shown.items()}
        for value in event.summary.value:
            shown.setdefault(value.tag, []).append((event.step, value.simple_value))
    return shown


def test_tensorboard_shows_each_step_once_when_a_run_is_resumed(tmp_path: Path) -> None:
    options = replace(Options(), telemetry=replace(QUIET, tensorboard=True))
    _carry_out(options, tmp_path, 1, 5)
    _carry_out(options, tmp_path, 4, 8)
    shown = _shown(_events(tmp_path / "tensorboard"))
    assert shown["loss/total"] == [(step, pytest.approx(1 / step)) for step in range(1, 9)]
    assert set(shown) == {"loss/total", "epoch"}, "what is not known is left out"


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


def test_events_wait_whole_while_the_disk_is_full(
    tmp_path: Path, full_disk: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    sink = TensorBoard(tmp_path, 0)
    sink.write(_row(1))
    (path,) = tmp_path.iterdir()
    full_disk(path.stat().st_size + 5)
    sink.write(_row(2))
    sink.write(_row(3))
    assert [step for step, _ in _shown(_events(tmp_path))["loss/total"]] == [1]
    full_disk(-1)
    sink.write(_row(4))
    assert [step for step, _ in _shown(_events(tmp_path))["loss/total"]] == [1, 2, 3, 4]
    assert len(caplog.records) == 1


def _histories(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Read the rows of an offline run: a log of blocks of 32 KiB, in which a record may be cut into pieces."""
    data, place, piece, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        if place + 7 + size > len(data):  # not written in full yet
            break
        piece += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            record = Record.FromString(piece)
            piece = b""
            if record.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
                found.append((record.history.step.num, {name: json.loads(text) for name, text in items.items()}))
    return found


def test_weights_and_biases_gets_each_step_once_in_one_run_when_it_is_resumed(tmp_path: Path) -> None:
    options = replace(Options(), name="some run", telemetry=replace(QUIET, wandb=True))
    _carry_out(options, tmp_path, 1, 5)
    time.sleep(1.1)  # W&B names a folder by the second, and a run takes longer to start again
    _carry_out(options, tmp_path, 4, 8)
    paths = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len({path.name for path in paths}) == 1, "the same run"

    def rows() -> list[tuple[int, dict[str, Any]]]:
        return [row for path in paths for row in _histories(path)]

    _await(lambda: len(rows()) >= 8)  # the package's own process may still write when finish() returns
    assert [step for step, _ in rows()] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["loss/total"] for _, row in rows()] == [1 / step for step in range(1, 9)]


def test_wandb_is_asked_for_in_one_sentence_when_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: str) -> None:
        raise ImportError

    monkeypatch.setattr(weights_and_biases.importlib, "import_module", gone)
    options = replace(Options(), telemetry=replace(QUIET, wandb=True))
    with pytest.raises(
        ConfigError, match=r"^telemetry\.wandb=true needs the package wandb: pip install 'scinet\[wandb\]'$"
    ):
        Station(options, ALONE, RunDirectory(tmp_path))


class _Failing:
    """A sink that breaks at its third row."""

    name = "it"

    def __init__(self) -> None:
        self.steps: list[int] = []

    def write(self, row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise ValueError("the\nnetwork is gone")
        self.steps.append(row["step"])

    def close(self, patience_s: float) -> None:
        raise AssertionError("it was given up")


@pytest.mark.parametrize("is_apart", [False, True])
def test_run_goes_on_with_one_warning_when_a_sink_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_apart: bool
) -> None:
    failing = _Failing()
    rows = Fan(MetricsLog(tmp_path / "metrics.jsonl"))
    rows.add(Background("it", lambda: failing) if is_apart else failing)
    for step in range(1, 7):
        rows.write(_row(step))
    rows.close(20)
    assert failing.steps == [1, 2]
    assert [row["step"] for row in MetricsLog(tmp_path / "metrics.jsonl").rows] == [1, 2, 3, 4, 5, 6]
    assert [record.getMessage() for record in caplog.records] == [
        "it gets no more rows (the network is gone): metrics.jsonl has them all"
    ]


def test_run_does_not_wait_when_a_sink_cannot_be_made_or_hangs(caplog: pytest.LogCaptureFixture) -> None:
    never = threading.Event()
    rows = Fan(MetricsLog(None))

    def refused() -> Any:
        raise OSError("no login")

    rows.add(Background("one", refused))
    rows.add(Background("other", lambda: never.wait(60) and _Failing()))
    rows.write(_row(1))
    rows.close(0.2)
    never.set()
    messages = sorted(record.getMessage() for record in caplog.records)
    assert messages[1].startswith("other gets no more rows (the last rows are not taken")
    assert messages[0] == "one gets no more rows (no login): metrics.jsonl has them all"


def test_figures_go_on_from_the_rows_that_stay_when_a_run_is_resumed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 2, "pseudo_positives": 5.0, "loss/total": 3.0})
    log.write({"step": 2, "holdout_map": 50.0, "holdout_map_student": 40.0})
    log.write({"step": 4, "pseudo_positives": 7.0, "loss/total": 2.0})
    said: list[str] = []
    directory = RunDirectory(tmp_path)
    with Station(replace(Options(), name="again"), ALONE, directory) as station:
        station.begin(_standing(3), said.append)
        (line,) = said
        entries = json.loads(directory.targets.read_text())
        assert line == f"metrics: http://{entries[0]['targets'][0]}/metrics"
        assert [entry["labels"] for entry in entries] == [{"run": "again"}]
        with urllib.request.urlopen(line.removeprefix("metrics: "), timeout=20) as answer:
            text = answer.read().decode().splitlines()
        for wanted in (
            "scinet_train_samples_total 48.0",
            "scinet_train_pseudo_labels_total 5.0",
            'scinet_train_loss{part="total"} 3.0',
            "scinet_holdout_best_mean_average_precision_ratio 0.5",
            'scinet_rank_up{host="' in "".join(text)
            and 'scinet_run_info{method="scinet",profile="paper",run="again"} 1.0',
        ):
            assert wanted in text
    assert not directory.targets.exists()


@pytest.mark.parametrize(
    ("error", "stays"), [(TrainingError("NaN"), True), (Preempted("SIGTERM"), False), (KeyboardInterrupt(), False)]
)
def test_target_stays_for_prometheus_to_miss_when_a_run_fails(
    tmp_path: Path, error: BaseException, stays: bool
) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    with contextlib.suppress(type(error)), Station(Options(), ALONE, directory) as station:
        station.begin(_standing(0), lambda _: None)
        assert directory.targets.exists()
        raise error
    assert directory.targets.exists() is stays
    off = replace(Options(), telemetry=TelemetryOptions(prometheus=Prometheus.off))
    with Station(off, ALONE, directory) as station:
        station.begin(_standing(0), lambda _: None)
        assert not directory.targets.exists(), "it goes on, and is not down"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"host": "192.0.2.7"}, "rank 0 cannot listen on telemetry.host=192.0.2.7, port 0 ("),
        ({"host": "no such host"}, "rank 0 cannot listen on telemetry.host=no such host, port 0 ("),
        ({"host": "a..b"}, "rank 0 cannot listen on telemetry.host=a..b, port 0 ("),
    ],
)
def test_address_is_refused_in_one_sentence_when_nothing_can_listen_there(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    options = replace(Options(), telemetry=TelemetryOptions(**changes))
    with pytest.raises(ConfigError) as refused:
        Station(options, ALONE, RunDirectory(tmp_path))
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)


def test_port_is_refused_with_its_remedy_when_it_is_taken_or_too_high(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = replace(Options(), telemetry=TelemetryOptions(port=port))
        with pytest.raises(ConfigError, match=rf"port {port} \(Address already in use; .*telemetry\.port=0 for a free"):
            Station(options, ALONE, RunDirectory(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "3")
    options = replace(Options(), telemetry=TelemetryOptions(prometheus=Prometheus.every_rank, port=65533))
    with pytest.raises(ConfigError, match=r"would listen on port 65536, telemetry\.port is 65533: set another"):
        Station(options, ALONE, RunDirectory(tmp_path))


def test_nothing_listens_when_nothing_is_trained_or_it_is_off(tmp_path: Path) -> None:
    for options in (replace(Options(), method=Method.zero_shot), replace(Options(), telemetry=QUIET)):
        said: list[str] = []
        with Station(options, ALONE, RunDirectory(tmp_path)) as station:
            station.begin(_standing(0), said.append)
        assert said == []
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "gateway", ["http://127.0.0.1:{port}", "http://[", "http://no such host", "http://127.0.0.1:x"]
)
def test_run_is_not_held_up_when_the_gateway_cannot_be_reached(caplog: pytest.LogCaptureFixture, gateway: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    pusher = Pusher(gateway.format(port=port), "run", refresh_s=0.01)
    pusher.publish("a 1\n")
    pusher.start()
    time.sleep(0.2)  # many refusals
    pusher.close(20)
    (record,) = caplog.records
    assert "are not pushed to" in record.getMessage()


def test_gateway_holds_the_last_figures_of_a_run_that_has_ended(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    try:
        gateway = subprocess.Popen(
            ["prometheus-pushgateway", f"--web.listen-address={address}"], stderr=subprocess.DEVNULL
        )
    except FileNotFoundError:
        pytest.fail("there is no prometheus-pushgateway: apt-get install prometheus-pushgateway")
    try:
        telemetry = TelemetryOptions(prometheus=Prometheus.push, push_gateway=f"http://{address}/", refresh_s=0.2)
        # a name that must be written otherwise in an address, and another job's group beside it
        options = replace(Options(), name="a run?50%", telemetry=telemetry)
        _await(lambda: urllib.request.urlopen(f"http://{address}/-/ready", timeout=5).status == 200)
        with Station(options, ALONE, RunDirectory(tmp_path)) as station:
            station.begin(_standing(0), lambda _: None)
            station.rows.write(_row(2))
            station.observer.stand(_standing(2))
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as answer:
            text = answer.read().decode()
        labels = 'instance="",job="scinet",run="a run?50%"'
        assert f"scinet_train_samples_total{{{labels}}} 32\n" in text
        assert 'scinet_train_loss{instance="",job="scinet",part="total",run="a run?50%"} 0.5\n' in text
        assert not RunDirectory(tmp_path).targets.exists()
    finally:
        gateway.kill()
        gateway.wait()


def _await(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if is_true():
                return
        except OSError:
            pass
        time.sleep(0.05)
    pytest.fail("it never came")
