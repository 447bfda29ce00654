"""Debian's Prometheus server watches a live run: what it answers, what the dashboard asks it, and which alerts fire."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from typing import Any

import psutil
import pytest

import scinet.train
from scinet.telemetry import read_metrics
from scinet_cluster import faults
from scinet_cluster.addresses import free_port
from scinet_cluster.soak_start import Start, step_of

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "cluster" / "prometheus"
DASHBOARD = json.loads((ROOT / "cluster" / "grafana" / "scinet.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
# of a GPU, of what fires, and of a push gateway: a run on the CPU that is well has none of it
MAY_BE_SILENT = {"scinet_gpu_memory_allocated_bytes", "ALERTS", "push_time_seconds"}
PATIENCE_S = 120  # generous: of a busy machine


def binary(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"there is no {name}: apt-get install prometheus")
    return found


def promtool(*words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [binary("promtool"), *map(str, words)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=60)


@dataclass(frozen=True)
class Server:
    """A Prometheus server that watches a folder of runs."""

    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def samples(self, expression: str, at: float | None = None) -> list[tuple[dict[str, str], float]]:
        """Return labels and values of an instant query."""
        result = self.ask("query", query=expression, **({} if at is None else {"time": str(at)}))["result"]
        return [(each["metric"], float(each["value"][1])) for each in result]

    def value(self, expression: str, at: float | None = None) -> float:
        ((_, value),) = self.samples(expression, at)
        return value

    def firing(self) -> set[tuple[str, str, str]]:
        """Return name, run and rank of the alerts that fire."""
        alerts = [each["labels"] for each in self.ask("alerts")["alerts"] if each["state"] == "firing"]
        return {(each["alertname"], each["run"], each.get("rank", "")) for each in alerts}


@dataclass(frozen=True)
class Watched:
    """A run on two ranks, and the server that scrapes it."""

    run: Path
    start: Start
    server: Server

    def rank(self, number: int) -> psutil.Process:
        ranks = map(psutil.Process, faults.processes(self.start.mark).ranks)
        return next(process for process in ranks if process.environ()["RANK"] == str(number))


def until(holds: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, f"{what} did not come within {PATIENCE_S} s"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Server]]:
    """The shipped configuration in a folder of its own, hurried: scraped each second, alerts wait for two."""
    clone = tmp_path_factory.mktemp("clone")
    shutil.copytree(SHIPPED, clone / "cluster" / "prometheus")
    configuration = clone / "cluster" / "prometheus" / "prometheus.yml"
    for path, pattern, hurried in (
        (configuration, r"(_interval): \d+s", r"\1: 1s"),
        (configuration.with_name("alerts.yml"), r"( for): \d+m", r"\1: 2s"),
    ):
        text, count = re.subn(pattern, hurried, path.read_text())
        assert count >= 3
        path.write_text(text)
    (clone / "runs").mkdir()
    port = free_port()
    options = (f"--storage.tsdb.path={clone / 'server'}", f"--web.listen-address=127.0.0.1:{port}")
    log = (clone / "log").open("wb")
    with (
        log,
        subprocess.Popen(
            [binary("prometheus"), f"--config.file={configuration}", *options], stdout=log, stderr=log
        ) as process,
    ):
        url = f"http://127.0.0.1:{port}"
        try:
            until(lambda: _is_ready(url) or process.poll() is not None, "the server")
            assert process.poll() is None, (clone / "log").read_text()
            yield clone / "runs", Server(url)
        finally:
            process.kill()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module")
def watched(server: tuple[Path, Server], small: tuple[str, ...]) -> Iterator[Watched]:
    """A run that would go on for hours, from two epochs of five steps on."""
    output, prometheus = server
    run = output / "live"
    own = ("train.max_steps=0", "train.epochs=9999", "checkpoint.every_steps=2", "data.on_bad_sample=skip")
    words = (scinet.train.__file__, *small, *own, "telemetry.refresh_s=0.5", f"output={output}")
    with Start(words, run, ranks=2, grace_s=2) as start:
        until(lambda: step_of(run) > 12 or not start.is_running, "the twelfth step")
        assert start.is_running, start.text
        until(lambda: prometheus.samples("scinet_train_steps_total > 12"), "its scrape")
        yield Watched(run, start, prometheus)


def test_shipped_configuration_and_rules_pass_promtool() -> None:
    for words in (
        ("check", "config", "--lint=all", "--lint-fatal", SHIPPED / "prometheus.yml"),
        ("check", "rules", "--lint=all", "--lint-fatal", SHIPPED / "alerts.yml"),
        ("test", "rules", SHIPPED / "alerts_test.yml"),
    ):
        done = promtool(*words)
        assert done.returncode == 0, done.stdout + done.stderr


def test_script_that_installs_the_servers_is_clean_by_shellcheck() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, ROOT / ".ci" / "services"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_alert_has_a_severity_and_says_what_to_do() -> None:
    text = (SHIPPED / "alerts.yml").read_text()
    count = text.count("- alert: ")
    assert count == 6
    for key in ("severity", "summary", "description"):
        assert len(re.findall(rf"^ +{key}: ", text, re.MULTILINE)) == count, key
    tested = set(re.findall(r"- alertname: (\w+)", (SHIPPED / "alerts_test.yml").read_text()))
    assert set(re.findall(r"- alert: (\w+)", text)) == tested


@pytest.mark.multiprocess
@pytest.mark.nightly
def test_server_answers_what_the_run_wrote(watched: Watched) -> None:
    server = watched.server
    until(lambda: server.samples("rate(scinet_train_samples_total[20s]) > 0"), "throughput")
    at = time.time()
    step = server.value("scinet_train_steps_total", at)
    loss = server.value('scinet_train_loss{run="live", part="total"}', at)
    speed = server.value("rate(scinet_train_samples_total[20s])", at)
    assert server.value("scinet_train_samples_total", at) == step * 16
    until(lambda: step_of(watched.run) > step, "a row")
    rows = [row for row in read_metrics(watched.run / "metrics.jsonl") if "loss/total" in row]
    # a scrape may come between a step and its row
    assert loss in [row["loss/total"] for row in rows if abs(row["step"] - step) <= 1]
    assert 0 < speed < 1.5 * max(row["samples_per_second"] for row in rows)
    maps = [row["holdout_map"] for row in read_metrics(watched.run / "metrics.jsonl") if "holdout_map" in row]
    teacher = server.value('scinet_holdout_mean_average_precision_ratio{network="teacher"}')
    assert any(teacher == pytest.approx(found / 100) for found in maps)
    assert sorted((labels["rank"], value) for labels, value in server.samples("scinet_rank_up")) == [("0", 1), ("1", 1)]
    assert server.firing() == set()


@pytest.mark.multiprocess
@pytest.mark.nightly
def test_scraped_text_passes_promtool(watched: Watched) -> None:
    (target,) = watched.server.ask("targets", state="active")["activeTargets"]
    assert target["labels"] == {"instance": target["discoveredLabels"]["__address__"], "job": "scinet", "run": "live"}
    with urllib.request.urlopen(target["scrapeUrl"].replace(target["globalUrl"], ""), timeout=5) as answer:
        done = promtool("check", "metrics", stdin=answer.read().decode())
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def _filled_in(expression: str, *, rate_interval: str, run: str) -> str:
    """Replace variables as Grafana does: several chosen runs are alternatives of a regular expression."""
    filled = expression.replace("$__rate_interval", rate_interval).replace("$run", run)
    assert "$" not in filled
    return filled


# four scrapes, as Grafana takes, of a data source that scrapes each second and each minute
@pytest.mark.parametrize(("rate_interval", "run"), [("4s", ".+"), ("4m0s", "(live|another)")])
@pytest.mark.multiprocess
@pytest.mark.nightly
def test_every_query_of_the_dashboard_has_data(watched: Watched, rate_interval: str, run: str) -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            expression = _filled_in(target["expr"], rate_interval=rate_interval, run=run)
            found = watched.server.samples(expression)
            is_silent = any(name in expression for name in MAY_BE_SILENT)
            assert bool(found) is not is_silent, f"{panel['title']}: {expression}"
            for labels, _ in found:
                assert labels["run"] == "live"
                assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= set(labels)
    none = _filled_in(PANELS[0]["targets"][0]["expr"], rate_interval=rate_interval, run="another")
    assert watched.server.samples(none) == []


@pytest.mark.multiprocess
@pytest.mark.nightly
def test_all_alerts_are_evaluated_and_know_only_metrics_that_exist(watched: Watched) -> None:
    server = watched.server
    (group,) = server.ask("rules")["groups"]
    assert {rule["name"]: rule["health"] for rule in group["rules"]} == dict.fromkeys(
        ("RunDown", "RankMissing", "RunStalled", "BadNumbers", "DataStarvation", "CheckpointTooOld"), "ok"
    )
    known = set(server.ask("label/__name__/values"))
    asked = [rule["query"] for rule in group["rules"]]
    asked += [target["expr"] for panel in PANELS for target in panel["targets"]]
    named = set(re.findall(r"\b(\w+)\{", " ".join(asked)))
    assert named - known == MAY_BE_SILENT
    (variable,) = [each for each in DASHBOARD["templating"]["list"] if each["name"] == "run"]
    query = re.fullmatch(r"label_values\((.+), (run)\)", variable["definition"])
    assert query is not None
    assert server.ask(f"label/{query[2]}/values", **{"match[]": query[1]}) == ["live"]


@pytest.mark.multiprocess
@pytest.mark.nightly
def test_alerts_fire_when_a_rank_stops_and_when_the_run_is_killed(watched: Watched) -> None:
    server = watched.server
    watched.rank(1).send_signal(SIGSTOP)
    until(lambda: ("RankMissing", "live", "1") in server.firing(), "the alert of a rank")
    assert server.value("sum(scinet_rank_up)") == 1
    watched.rank(1).send_signal(SIGCONT)
    until(lambda: not server.firing(), "the alert's end")
    faults.kill_all(watched.start.mark)
    until(lambda: server.firing() == {("RunDown", "live", "")}, "the alert of a run")


def test_panels_of_the_dashboard_are_complete_and_lie_side_by_side() -> None:
    titles = [panel["title"] for panel in PANELS]
    assert len(titles) == len(set(titles)) > 20
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["type"] == "table" or panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            # a run that starts again is another instance
            assert " by (" in target["expr"], panel["title"]
            selectors = re.findall(r"{(.*?)}", target["expr"])
            assert all(each.startswith('job="scinet", run=~"$run"') for each in selectors), panel["title"]
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
