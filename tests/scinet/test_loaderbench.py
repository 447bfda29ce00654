"""The bench of the reading path: every contestant reads every sample, and the table says what was aimed at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scinet import loaderbench
from scinet.data.card import DataCard
from scinet.errors import ConfigError
from scinet.loaderbench import FILES, LIMIT, OURS, WEBDATASET, Resume, Row, Setting
from tests.scinet.conftest import MakeShards

SETTING = Setting(images=12, batch=5, workers=0, image_size=32, repeats=1)


@pytest.fixture(scope="module")
def card(make_shards: MakeShards) -> DataCard:
    return make_shards(20, shard_samples=5)


@pytest.mark.parametrize("contestant", ["_bare_loop", "_ours", "_plain_webdataset", "_files"])
@pytest.mark.parametrize("workers", [0, 2])
def test_contestant_reads_every_sample(card: DataCard, tmp_path: Path, contestant: str, workers: int) -> None:
    setting = Setting(images=12, batch=5, workers=workers, image_size=32, repeats=1)
    material = loaderbench._prepare(card, tmp_path, setting)
    source = loaderbench._source(material, material.card, setting)
    arguments = {"_bare_loop": (material,), "_ours": (source,)}.get(contestant, (material, setting))
    # whole shards are taken
    assert getattr(loaderbench, contestant)(*arguments) == len(material.stored) == 15


def test_rows_are_in_units_of_ours(card: DataCard, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(loaderbench, "SKIPPED", 60)
    rows, resume = loaderbench.measure(card, SETTING, said.append)
    assert {row.contestant for row in rows} == {OURS, WEBDATASET, FILES, LIMIT}
    assert said == ["turn 1 of 1, 15 images", "skip 60 samples"]
    ours = next(row for row in rows if row.contestant == OURS)
    assert ours.ours_over_it == 1.0
    for row in rows:
        assert row.ours_over_it == pytest.approx(ours.samples_per_s / row.samples_per_s)
    assert resume.skipped == 60
    assert resume.reading_s == pytest.approx(60 / ours.samples_per_s)
    whole = json.loads(loaderbench.to_json(rows, resume, SETTING))
    assert whole["resume"]["skipped"] == 60
    assert whole["setting"]["images"] == 12
    assert len(whole["rows"]) == 4


def test_table_says_what_was_met_and_when_the_machine_was_busy() -> None:
    rows = [Row(LIMIT, 200.0, 0.8, 0.9, False), Row(OURS, 160.0, 1.0, None, False), Row(FILES, 100.0, 1.6, 1.0, False)]
    text = loaderbench.report(rows, Resume(100_000, 0.5, 500.0), SETTING)
    assert "Resuming after 100,000 samples: 0.50 s; reading them: 500 s, 1,000 times as long (target 50, met)." in text
    assert f"| {LIMIT} | 200.0 | 5.00 | 0.800 | 0.9 missed |" in text
    assert f"| {FILES} | 100.0 | 10.00 | 1.600 | 1 met |" in text
    assert "measure again" in text


def test_batch_is_refused_when_there_are_fewer_images(card: DataCard, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--batch 64 is more than the 20 training images"):
        loaderbench._prepare(card, tmp_path, Setting(999, 64, 0, 32, 1))
