"""A run of two ranks is watched while it goes on, and is the same run as one that nobody watches."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file

from scinet import train
from scinet.distributed import Ranks, from_first_rank, gather_objects, wait_for_all
from scinet.errors import ConfigError
from scinet.options import Options, Prometheus, TelemetryOptions
from scinet.rundir import RunDirectory
from scinet.telemetry.observer import Standing
from scinet.telemetry.station import Station
from tests import ranks as forked

pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).resolve().parents[2]
STEPS = 25
CLOCKS = {"samples_per_second", "data_wait_share"}
LONGEST_S = 240
WHOLE = {
    "scinet_build_info",
    "scinet_run_info",
    "scinet_world_size",
    "scinet_train_samples_total",
    "scinet_train_steps_total",
    "scinet_train_planned_steps",
    "scinet_train_epoch",
    "scinet_train_loss",
    "scinet_train_learning_rate",
    "scinet_train_gradient_norm",
    "scinet_train_known_ratio",
    "scinet_train_pseudo_labels_total",
    "scinet_train_pseudo_label_precision_ratio",
    "scinet_train_pseudo_label_recall_ratio",
    "scinet_train_skipped_samples_total",
    "scinet_train_bad_steps_total",
    "scinet_holdout_mean_average_precision_ratio",
    "scinet_holdout_best_mean_average_precision_ratio",
    "scinet_fusion_weight",
    "scinet_holdout_fusion_log_loss",
    "scinet_holdout_fusion_mean_average_precision_ratio",
    "scinet_checkpoint_duration_seconds_sum",
    "scinet_checkpoint_duration_seconds_count",
    "scinet_checkpoint_last_timestamp_seconds",
    "scinet_checkpoint_stall_seconds_total",
    "scinet_checkpoint_failures_total",
}
OF_EACH_RANK = {
    "scinet_step_duration_seconds_bucket",
    "scinet_step_duration_seconds_sum",
    "scinet_step_duration_seconds_count",
    "scinet_data_wait_seconds_bucket",
    "scinet_data_wait_seconds_sum",
    "scinet_data_wait_seconds_count",
    "scinet_fusion_duration_seconds_sum",
    "scinet_fusion_duration_seconds_count",
    "scinet_rank_up",
    "scinet_rank_heartbeat_timestamp_seconds",
    "scinet_rank_steps_total",
    "scinet_data_retries_total",
    "scinet_process_resident_memory_bytes",
}


@dataclass(frozen=True)
class Watched:
    """A run with all sinks, and what was seen of it."""

    run: Path
    text: str
    targets: list[dict[str, Any]]
    said: str
    ups: list[dict[str, float]]  # before, while and after rank 1 stood still
    port: int


def _samples(text: str) -> list[Any]:
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def _by_rank(text: str, name: str) -> dict[str, float]:
    return {sample.labels["rank"]: sample.value for sample in _samples(text) if sample.name == name}


def _words(on_features: tuple[str, ...], output: Path, name: str) -> list[str]:
    return [
        *on_features,
        f"output={output}",
        f"name={name}",
        "train.global_batch_size=16",
        f"train.max_steps={STEPS}",
        "train.log_every_steps=2",
        "loss.warmup_fraction=0.1",
    ]


def _until(look: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """Return what a look finds once it finds something."""
    deadline = time.monotonic() + LONGEST_S
    while time.monotonic() < deadline:
        try:
            if found := look():
                return found
        except OSError:
            pass
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.05)
    pytest.fail("it never came")


@pytest.fixture(scope="module")
def watched(on_features: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Watched:
    output = tmp_path_factory.mktemp("watched")
    words = _words(on_features, output, "all of it")
    words += ["telemetry.refresh_s=0.2", "telemetry.tensorboard=true", "telemetry.wandb=true"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "scinet/train.py", *words]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    run = output / "all of it"
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            targets = _until(lambda: json.loads(RunDirectory(run).targets.read_text()), process)
            target = targets[0]["targets"][0]

            def scraped() -> str:
                with urllib.request.urlopen(f"http://{target}/metrics", timeout=20) as answer:
                    return str(answer.read().decode())

            def full() -> str:
                text = scraped()
                done = _by_rank(text, "scinet_rank_steps_total")
                is_judged = "scinet_holdout_best" in text and "scinet_checkpoint_last" in text
                return text if min(done.get(rank, 0) for rank in "01") >= 6 and is_judged else ""

            text = _until(full, process)
            other = next(
                child
                for child in psutil.Process(process.pid).children(recursive=True)
                if child.environ().get("RANK") == "1"
            )
            ups = [_by_rank(text, "scinet_rank_up")]
            for number, is_up in ((signal.SIGSTOP, 0), (signal.SIGCONT, 1)):
                os.kill(other.pid, number)
                ups.append(_until(lambda is_up=is_up: _stands(_by_rank(scraped(), "scinet_rank_up"), is_up), process))
            said = process.communicate(timeout=LONGEST_S)[1]
        finally:
            process.kill()
    assert process.returncode == 0, said[-3000:]
    return Watched(run, text, targets, said, ups, int(target.rpartition(":")[2]))


def _stands(ups: dict[str, float], is_up: int) -> dict[str, float]:
    return ups if ups["1"] == is_up else {}


def test_one_scrape_of_rank_0_has_every_figure_of_every_rank(watched: Watched) -> None:
    found = _samples(watched.text)
    assert {sample.name for sample in found if "rank" not in sample.labels} == WHOLE
    for name in OF_EACH_RANK:
        assert {sample.labels["rank"] for sample in found if sample.name == name} == {"0", "1"}
    assert {sample.name for sample in found} == WHOLE | OF_EACH_RANK
    steps = _by_rank(watched.text, "scinet_rank_steps_total")
    assert _by_rank(watched.text, "scinet_step_duration_seconds_count") == steps
    assert _by_rank(watched.text, "scinet_fusion_duration_seconds_count") == {r: 2 * n for r, n in steps.items()}
    whole = {sample.name: sample.value for sample in found if not sample.labels}
    assert whole["scinet_train_samples_total"] == 16 * whole["scinet_train_steps_total"]
    assert whole["scinet_world_size"] == 2
    assert whole["scinet_train_planned_steps"] == STEPS


def test_promtool_has_nothing_to_say(watched: Watched) -> None:
    try:
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=watched.text, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("promtool comes with Debian's package prometheus")
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_rank_is_down_while_its_process_stands_still(watched: Watched) -> None:
    assert watched.ups == [{"0": 1, "1": 1}, {"0": 1, "1": 0}, {"0": 1, "1": 1}]


def test_run_is_found_while_it_goes_on_and_gone_afterwards(watched: Watched) -> None:
    target = f"127.0.0.1:{watched.port}"
    assert watched.targets == [{"targets": [target], "labels": {"run": "all of it"}}]
    assert f"\nmetrics: http://{target}/metrics\n" in watched.said
    assert not RunDirectory(watched.run).targets.exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", watched.port), timeout=20)
    assert list(watched.run.glob("tensorboard/events.out.tfevents.*"))
    assert list(watched.run.glob("wandb/offline-run-*/run-*.wandb"))


def test_training_is_bit_equal_when_nobody_is_told(
    watched: Watched, on_features: tuple[str, ...], tmp_path: Path
) -> None:
    words = [*_words(on_features, tmp_path, "alone"), "telemetry.prometheus=off"]
    ended = [rank.end(LONGEST_S) for rank in forked.start(train.main, words, size=2)]
    assert [status for status, _ in ended] == [0, 0], ended
    assert not any("metrics:" in line for _, lines in ended for line in lines)
    alone = tmp_path / "alone"
    rows = []
    for run in (alone, watched.run):
        lines = (run / "metrics.jsonl").read_text().splitlines()
        rows.append([{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines])
    assert rows[0] == rows[1]
    assert all(row["holdout_map_student"] > 0 for row in rows[0] if "holdout_map" in row)
    paths = sorted(path.relative_to(alone) for path in alone.glob("checkpoints/*/*.safetensors"))
    assert len(paths) >= 4, "two selected networks and two parts of a checkpoint"
    for path in paths:
        got, want = load_file(str(watched.run / path)), load_file(str(alone / path))
        assert [name for name in want if not torch.equal(got[name].nan_to_num(7.0), want[name].nan_to_num(7.0))] == []


def _serve(ranks: Ranks, out: Path) -> dict[str, Any]:
    """Serve every rank's own figures, look at them from rank 0, and let a port be taken that only rank 1 wants."""
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
    return {"targets": targets, "texts": texts, "refusals": refusals, "taken": port}


def test_every_rank_serves_its_own_when_asked_to(tmp_path: Path) -> None:
    seen = forked.run(_serve, tmp_path / "run", size=2)[0]
    entries, texts = seen["targets"], seen["texts"]
    assert [entry["labels"] for entry in entries] == [{"run": "run", "rank": "0"}, {"run": "run", "rank": "1"}]
    ports = [int(entry["targets"][0].rpartition(":")[2]) for entry in entries]
    assert ports[0] != ports[1]
    assert [set(_by_rank(text, "scinet_rank_steps_total")) for text in texts] == [{"0"}, {"1"}]
    assert ["scinet_world_size 2.0" in text for text in texts] == [True, False]
    # a port that only rank 1 finds taken is refused by both, in one sentence
    assert len(set(seen["refusals"])) == 1
    assert f"rank 1 cannot listen on telemetry.host=127.0.0.1, port {seen['taken']} (" in seen["refusals"][0]


def test_run_is_refused_before_it_begins_when_its_port_is_taken(
    train: Any, on_features: tuple[str, ...], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = train(*_words(on_features, tmp_path, "refused"), f"telemetry.port={port}")
    assert result.status == 2
    assert result.err.splitlines()[-1].startswith(
        f"error: rank 0 cannot listen on telemetry.host=127.0.0.1, port {port} (Address already in use; "
    )
    assert list(tmp_path.iterdir()) == []
