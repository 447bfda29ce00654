"""One text of many ranks: what a reader of Prometheus' format finds in it is what each rank has observed."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from scinet.distributed import Ranks
from scinet.options import Options
from scinet.telemetry.exposition import merged, render
from scinet.telemetry.figures import Figures, RunFigures
from scinet.telemetry.observer import Standing

HOSTILE = 'a"b\\n\n# HELP scinet_fake x\nscinet_fake{rank="0"} 7\r\x00{},é\udcff'
ROW = {
    "step": 7,
    "loss/total": 1.5,
    "loss/supervised": 1.0,
    "learning_rate": 1e-4,
    "gradient_norm": float("inf"),
    "known_ratio": 0.3,
    "pseudo_positives": 4.0,
    "pseudo_precision": 0.5,
    "pseudo_recall": None,
}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def _samples(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def _ranks(number: int, times: list[list[float]], name: str) -> Figures:
    ranks = Ranks(number, len(times), torch.device("cpu"))
    figures = RunFigures(replace(Options(), name=name), ranks) if number == 0 else Figures(ranks)
    for seconds in times[number]:
        figures.step(seconds=seconds, waited_s=seconds / 10, fusion_s=[seconds / 4, seconds / 4])
    figures.stand(Standing(7, 70, 1, 112, 3, 1))
    if isinstance(figures, RunFigures):
        figures.write(ROW)
        figures.write({"step": 7, "holdout_map": 40.0, "holdout_map_student": 30.0})
        figures.write({"step": 9, "holdout_map": 35.0, "holdout_map_student": 36.0})
        figures.checkpoint(2.0, is_written=True)
        figures.checkpoint(1.0, is_written=False)
        figures.stalled(0.5)
    return figures


@given(
    times=st.lists(st.lists(st.floats(0, 1e6), max_size=4), min_size=1, max_size=4),
    name=st.text(st.characters(exclude_categories=())),
)
@settings(max_examples=60, deadline=None)
def test_merged_text_holds_the_samples_of_every_rank_once(times: list[list[float]], name: str) -> None:
    texts = [render(_ranks(number, times, name).registry.collect()) for number in range(len(times))]
    text = merged(texts)
    union: Samples = {}
    for own in texts:
        union |= _samples(own)
    assert _samples(text) == union
    heads = [line.split(" ")[:3] for line in text.split("\n") if line.startswith("#")]
    assert len(heads) == len({tuple(head) for head in heads}), "each family has one HELP and one TYPE"
    for number, seconds in enumerate(times):
        rank = ("rank", str(number))
        assert union["scinet_step_duration_seconds_count", frozenset([rank])] == len(seconds)
        assert union["scinet_step_duration_seconds_sum", frozenset([rank])] == pytest.approx(sum(seconds))
        assert union["scinet_fusion_duration_seconds_count", frozenset([rank])] == 2 * len(seconds)
        assert union["scinet_rank_steps_total", frozenset([rank])] == len(seconds)


def test_name_of_a_run_is_a_label_and_nothing_else_when_it_is_hostile() -> None:
    text = merged([render(_ranks(number, [[1.0], [2.0]], HOSTILE).registry.collect()) for number in (0, 1)])
    infos = [dict(labels) for name, labels in _samples(text) if name == "scinet_run_info"]
    assert [info["run"] for info in infos] == [HOSTILE.replace("\udcff", "?")]
    assert not any(name == "scinet_fake" for name, _ in _samples(text))


def test_figures_of_the_run_are_those_of_its_rows_and_standing() -> None:
    found = _samples(render(_ranks(0, [[1.0]], "run").registry.collect()))
    plain = {name: value for (name, labels), value in found.items() if not labels}
    assert plain["scinet_train_samples_total"] == 112
    assert plain["scinet_train_skipped_samples_total"] == 3
    assert plain["scinet_train_bad_steps_total"] == 1
    assert plain["scinet_train_planned_steps"] == 70
    assert plain["scinet_train_pseudo_labels_total"] == 4
    assert plain["scinet_train_pseudo_label_precision_ratio"] == 0.5
    assert "scinet_train_pseudo_label_recall_ratio" not in plain, "a ratio of nothing is not known"
    assert plain["scinet_checkpoint_duration_seconds_count"] == 1
    assert plain["scinet_checkpoint_duration_seconds_sum"] == 2.0
    assert plain["scinet_checkpoint_failures_total"] == 1
    assert plain["scinet_checkpoint_stall_seconds_total"] == 0.5
    assert plain["scinet_holdout_best_mean_average_precision_ratio"] == 0.4
    name = "scinet_holdout_mean_average_precision_ratio"
    networks = {dict(labels)["network"]: value for (found_name, labels), value in found.items() if found_name == name}
    assert networks == {"teacher": 0.35, "student": 0.36}
    parts = {dict(labels)["part"] for found_name, labels in found if found_name == "scinet_train_loss"}
    assert parts == {"total", "supervised"}


def test_promtool_has_nothing_to_say_of_all_figures_there_are() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool comes with Debian's package prometheus")
    text = merged([render(_ranks(number, [[1.0], [2.0]], HOSTILE).registry.collect()) for number in (0, 1)])
    checked = subprocess.run([promtool, "check", "metrics"], input=text.encode(), capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_counters_do_not_tell_when_they_were_made() -> None:
    assert "_created" not in render(_ranks(0, [[1.0]], "run").registry.collect())


def test_text_stands_as_it_is_when_there_is_one() -> None:
    families: list[Metric] = [GaugeMetricFamily("a", "first", value=1), GaugeMetricFamily("b", "second", value=2)]
    assert merged([render(families)]) == render(families)
