"""What is refused, and doubted, before a run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scinet import config, preflight
from scinet.data import mask_file
from scinet.data.card import DataCard
from scinet.errors import CheckpointError, ConfigError, DataError
from tests.scinet.conftest import MakeSamples, MakeShards


def test_figures_are_doubted_when_nothing_is_known_to_be_absent(
    make_shards: MakeShards, make_samples: MakeSamples
) -> None:
    test = make_samples(4, "test")
    assert not list(preflight.doubts(make_shards(samples=[*make_samples(4), *test])))
    positives_only = [replace(sample, negatives=()) for sample in test]
    (doubt,) = preflight.doubts(make_shards(samples=[*make_samples(4), *positives_only]))
    assert "split 'test' of" in doubt
    assert "its mAP is 100 whatever a model says" in doubt


def test_run_is_refused_when_a_split_that_it_needs_is_empty(make_shards: MakeShards, make_samples: MakeSamples) -> None:
    def problem(card: DataCard, *overrides: str) -> str:
        options = config.load(None, [f"data.path={card.directory}", *overrides])
        try:
            assert preflight.check(options) == card
        except ConfigError as error:
            return str(error)
        return ""

    train, holdout, test = (make_samples(4, split) for split in ("train", "holdout", "test"))
    assert problem(make_shards(samples=[*train, *holdout, *test])) == ""
    without_test, without_holdout = make_shards(samples=[*train, *holdout]), make_shards(samples=[*train, *test])
    assert "has no samples to test on (split 'test'" in problem(without_test)
    assert problem(without_test, "train.test_at_end=false") == ""
    assert "has no samples to select the best epoch by (split 'holdout'" in problem(without_holdout)
    assert problem(without_holdout, "method=zero_shot") == ""
    assert "has no samples to train on" in problem(make_shards(samples=[*holdout, *test]))


@pytest.mark.parametrize("split", ["train", "holdout", "test"])
def test_run_is_refused_when_a_split_is_listed_without_a_sample(
    make_shards: MakeShards, make_samples: MakeSamples, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    card = make_shards(samples=[sample for name in ("train", "holdout", "test") for sample in make_samples(3, name)])
    emptied = replace(card, splits=card.splits | {split: replace(card.split(split), num_samples=0, shards=())})
    monkeypatch.setattr(preflight.sources, "read_card", lambda _: emptied)
    with pytest.raises(ConfigError, match=f"has no samples to .* \\(split '{split}'"):
        preflight.check(config.load())


def test_run_is_refused_when_its_mask_lacks_a_training_sample(
    make_shards: MakeShards, make_samples: MakeSamples, tmp_path: Path
) -> None:
    card = make_shards(samples=[sample for split in ("train", "holdout", "test") for sample in make_samples(3, split)])
    path = tmp_path / "mask.jsonl"
    options = config.load(None, [f"data.path={card.directory}", f"data.mask_file={path}"])
    header = mask_file.Header(card.class_names, "", "train", "", 3, None, False, None)
    mask_file.write(path, header, [mask_file.Row(f"train-{number:04d}", (), ()) for number in range(3)])
    assert preflight.check(options) == card
    path.unlink()
    mask_file.write(path, header, [mask_file.Row(f"train-{number:04d}", (), ()) for number in range(2)])
    with pytest.raises(DataError, match="train-0002"):
        preflight.check(options)


@pytest.mark.parametrize("split", ["holdout", "test"])
def test_figures_of_either_split_are_doubted(make_shards: MakeShards, make_samples: MakeSamples, split: str) -> None:
    positives_only = [replace(sample, negatives=()) for sample in make_samples(4, split)]
    (doubt,) = preflight.doubts(make_shards(samples=[*make_samples(4), *positives_only]))
    assert f"split '{split}' of" in doubt


@pytest.mark.parametrize(("typed", "meant"), [("embeded_", "embedded"), ("vit-b-16", "ViT-B-16"), ("RN11", "RN1")])
def test_nearest_backbone_is_named_when_none_has_that_name(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"model.backbone='{typed}' is no open_clip model; did you mean '{meant}"):
        preflight.check_backbone(typed)


def test_names_of_open_clip_are_those_that_it_lists() -> None:
    import open_clip

    for name in (*open_clip.list_models(), "ViT-B/16", "embedded", "debug", "hf-hub:somebody/model"):
        preflight.check_backbone(name)


def test_run_directory_and_baseline_are_looked_at_when_they_decide(
    make_shards: MakeShards, make_samples: MakeSamples, tmp_path: Path
) -> None:
    card = make_shards(samples=[sample for split in ("train", "holdout", "test") for sample in make_samples(3, split)])
    words = [f"data.path={card.directory}", "train.global_batch_size=2", f"output={tmp_path}", "name=run"]
    preflight.check_start(config.load(None, words), 1)
    with pytest.raises(ConfigError, match="does not divide over 4 ranks"):
        preflight.check_start(config.load(None, words), 4)
    with pytest.raises(CheckpointError, match="nowhere is no run directory"):
        preflight.check_start(config.load(None, [*words, "baseline=nowhere"]), 1)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config.to_yaml(config.load(None, words)))
    (run / "evaluation.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a finished run"):
        preflight.check_start(config.load(None, words), 1)
    preflight.check_start(config.load(None, words), 2)  # the first rank's disk decides, once all have met
    preflight.check_start(config.load(None, [*words, "resume=true", "baseline=nowhere"]), 1)


_WITHOUT_TORCH = """
import sys
from scinet import train
status = train.main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(status)
"""


def test_wrong_configurations_are_told_without_torch(make_shards: MakeShards, tmp_path: Path) -> None:
    card = make_shards()
    for words in (["train.epoch=3"], ["data.path=/nowhere"], [f"data.path={card.directory}"], ["model.backbone=RN11"]):
        done = subprocess.run(
            [sys.executable, "-c", _WITHOUT_TORCH, *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1
