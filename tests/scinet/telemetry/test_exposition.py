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
        fusion = {"fusion/weight_label": 0.4, "fusion/log_loss_fused": 0.1, "fusion/map_fused": 50.0}
        figures.write({"step": 9, "holdout_map": 35.0, "holdout_map_student": 36.0, **fusion})
        figures.checkpoint(2.0, is_written=True)
        figures.checkpoint(1.0, is_written=False)
        figures.stalled(0.5)
        figures.stalled(0.25)
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
    assert plain["scinet_checkpoint_stall_seconds_total"] == 0.75
    assert plain["scinet_holdout_best_mean_average_precision_ratio"] == 0.4
    name = "scinet_holdout_mean_average_precision_ratio"
    networks = {dict(labels)["network"]: value for (found_name, labels), value in found.items() if found_name == name}
    assert networks == {"teacher": 0.35, "student": 0.36}
    parts = {dict(labels)["part"] for found_name, labels in found if found_name == "scinet_train_loss"}
    assert parts == {"total", "supervised"}


# what the dashboard, the alerts and `scinet top` ask for: type and labels by name
FAMILIES = {
    "scinet_build_info": ("gauge", "deepspeed python revision torch version"),
    "scinet_run_info": ("gauge", "method profile run"),
    "scinet_world_size": ("gauge", ""),
    "scinet_train_samples_total": ("counter", ""),
    "scinet_train_steps_total": ("counter", ""),
    "scinet_train_planned_steps": ("gauge", ""),
    "scinet_train_epoch": ("gauge", ""),
    "scinet_train_skipped_samples_total": ("counter", ""),
    "scinet_train_bad_steps_total": ("counter", ""),
    "scinet_train_loss": ("gauge", "part"),
    "scinet_train_learning_rate": ("gauge", ""),
    "scinet_train_gradient_norm": ("gauge", ""),
    "scinet_train_known_ratio": ("gauge", ""),
    "scinet_train_pseudo_label_precision_ratio": ("gauge", ""),
    "scinet_train_pseudo_label_recall_ratio": ("gauge", ""),
    "scinet_train_pseudo_labels_total": ("counter", ""),
    "scinet_holdout_mean_average_precision_ratio": ("gauge", "network"),
    "scinet_holdout_best_mean_average_precision_ratio": ("gauge", ""),
    "scinet_fusion_weight": ("gauge", "term"),
    "scinet_holdout_fusion_log_loss": ("gauge", "terms"),
    "scinet_holdout_fusion_mean_average_precision_ratio": ("gauge", "terms"),
    "scinet_checkpoint_duration_seconds_count": ("summary", ""),
    "scinet_checkpoint_duration_seconds_sum": ("summary", ""),
    "scinet_checkpoint_last_timestamp_seconds": ("gauge", ""),
    "scinet_checkpoint_stall_seconds_total": ("counter", ""),
    "scinet_checkpoint_failures_total": ("counter", ""),
    "scinet_step_duration_seconds_bucket": ("histogram", "le rank"),
    "scinet_step_duration_seconds_count": ("histogram", "rank"),
    "scinet_step_duration_seconds_sum": ("histogram", "rank"),
    "scinet_data_wait_seconds_bucket": ("histogram", "le rank"),
    "scinet_data_wait_seconds_count": ("histogram", "rank"),
    "scinet_data_wait_seconds_sum": ("histogram", "rank"),
    "scinet_fusion_duration_seconds_count": ("summary", "rank"),
    "scinet_fusion_duration_seconds_sum": ("summary", "rank"),
    "scinet_rank_steps_total": ("counter", "rank"),
    "scinet_data_retries_total": ("counter", "rank"),
    "scinet_process_resident_memory_bytes": ("gauge", "rank"),
}


def test_names_types_and_labels_are_those_that_are_asked_for() -> None:
    figures = _ranks(0, [[1.0]], "run")
    figures.write({**ROW, "gradient_norm": 1.0, "pseudo_recall": 0.25})  # type: ignore[attr-defined]
    found = {
        sample.name: (family.type, " ".join(sorted(sample.labels)))
        for family in text_string_to_metric_families(render(figures.registry.collect()))
        for sample in family.samples
    }
    assert found == FAMILIES


def test_times_of_a_step_go_to_their_own_families() -> None:
    found = _samples(render(_ranks(0, [[0.04, 8.0]], "run").registry.collect()))
    sums = {name: value for (name, _), value in found.items() if name.endswith("_sum")}
    assert sums["scinet_step_duration_seconds_sum"] == pytest.approx(8.04)
    assert sums["scinet_data_wait_seconds_sum"] == pytest.approx(0.804)
    assert sums["scinet_fusion_duration_seconds_sum"] == pytest.approx(4.02)
    plain = {name: value for (name, labels), value in found.items() if not labels}
    assert (plain["scinet_train_steps_total"], plain["scinet_train_epoch"], plain["scinet_world_size"]) == (7, 1, 1)
    assert plain["scinet_train_learning_rate"] == 1e-4
    assert plain["scinet_train_known_ratio"] == 0.3
    counts = {
        dict(labels)["le"]: value
        for (name, labels), value in found.items()
        if name.endswith("step_duration_seconds_bucket")
    }
    assert (counts["0.025"], counts["0.05"], counts["5.0"], counts["10.0"]) == (0, 1, 1, 2)


def test_pseudo_labels_are_counted_on_and_other_rows_replaced() -> None:
    figures = _ranks(0, [[1.0]], "run")
    assert isinstance(figures, RunFigures)
    figures.write({"step": 8, "loss/total": 0.5, "pseudo_positives": 6.0})
    found = _samples(render(figures.registry.collect()))
    plain = {name: value for (name, labels), value in found.items() if not labels}
    assert plain["scinet_train_pseudo_labels_total"] == 10
    assert "scinet_train_learning_rate" not in plain
    losses = {dict(labels)["part"]: value for (name, labels), value in found.items() if name == "scinet_train_loss"}
    assert losses == {"total": 0.5}


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
