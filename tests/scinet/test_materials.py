"""What is said about the data before a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from scinet import config, materials
from scinet.data import mask_file
from scinet.data.batch import Share
from scinet.data.card import DataCard
from scinet.distributed import Ranks
from scinet.errors import ConfigError, DataError
from scinet.model.backbone import Backbone, ImageTower
from tests.scinet import small_runs
from tests.scinet.conftest import MakeSamples, MakeShards


def test_figures_are_doubted_when_nothing_is_known_to_be_absent(
    make_shards: MakeShards, make_samples: MakeSamples
) -> None:
    test = make_samples(4, "test")
    assert not list(materials.doubts(make_shards(samples=[*make_samples(4), *test])))
    positives_only = [replace(sample, negatives=()) for sample in test]
    (doubt,) = materials.doubts(make_shards(samples=[*make_samples(4), *positives_only]))
    assert "split 'test' of" in doubt
    assert "its mAP is 100 whatever a model says" in doubt


def test_regions_that_zero_3_would_take_the_weights_of_are_refused() -> None:
    from open_clip.transformer import VisionTransformer

    from scinet.model import regions

    trunk = VisionTransformer(image_size=32, patch_size=16, width=16, layers=1, heads=2, mlp_ratio=2.0)
    image = ImageTower(trunk, nn.Identity(), has_regions=False, dense=regions.reader(trunk))
    backbone = Backbone(image, cast(Any, None), 16, 16, 20.0, cast(Any, None), "ViT", "0" * 64)
    words = ["model.head=cam", "deepspeed.zero_optimization.stage=3"]
    with pytest.raises(ConfigError, match=r"'model.head=cam' .* 'model.backbone=ViT' .* set stage 2"):
        materials.check_regions(config.load(None, words), backbone)
    materials.check_regions(config.load(None, [*words, "deepspeed.zero_optimization.stage=2"]), backbone)
    materials.check_regions(config.load(None, [*words, "model.head=linear"]), backbone)
    blind = replace(backbone, image=ImageTower(nn.Identity(), nn.Identity(), has_regions=False))
    options = config.load(None, ["data.cache_features=true", "data.cached_regions=2", "model.freeze_image=true"])
    with pytest.raises(ConfigError, match="shows no regions"):
        materials.check_regions(options, blind)


def test_run_is_refused_when_a_split_that_it_needs_is_empty(make_shards: MakeShards, make_samples: MakeSamples) -> None:
    def problem(card: DataCard, *overrides: str) -> str:
        options = config.load(None, [f"data.path={card.directory}", *overrides])
        try:
            assert materials.check(options) == card
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
    monkeypatch.setattr(materials.sources, "read_card", lambda _: emptied)
    with pytest.raises(ConfigError, match=f"has no samples to .* \\(split '{split}'"):
        materials.check(config.load())


def test_run_is_refused_when_its_mask_lacks_a_training_sample(
    make_shards: MakeShards, make_samples: MakeSamples, tmp_path: Path
) -> None:
    card = make_shards(samples=[sample for split in ("train", "holdout", "test") for sample in make_samples(3, split)])
    path = tmp_path / "mask.jsonl"
    options = config.load(None, [f"data.path={card.directory}", f"data.mask_file={path}"])
    header = mask_file.Header(card.class_names, "", "train", "", 3, None, False, None)
    mask_file.write(path, header, [mask_file.Row(f"train-{number:04d}", (), ()) for number in range(3)])
    assert materials.check(options) == card
    path.unlink()
    mask_file.write(path, header, [mask_file.Row(f"train-{number:04d}", (), ()) for number in range(2)])
    with pytest.raises(DataError, match="train-0002"):
        materials.check(options)


@pytest.mark.parametrize("split", ["holdout", "test"])
def test_figures_of_either_split_are_doubted(make_shards: MakeShards, make_samples: MakeSamples, split: str) -> None:
    positives_only = [replace(sample, negatives=()) for sample in make_samples(4, split)]
    (doubt,) = materials.doubts(make_shards(samples=[*make_samples(4), *positives_only]))
    assert f"split '{split}' of" in doubt


@pytest.mark.parametrize("last_batch", ["drop", "train"])
def test_share_of_a_rank_is_the_configured_one(last_batch: str) -> None:
    words = ["train.global_batch_size=24", "train.accumulation_steps=2", f"train.last_batch={last_batch}"]
    share = materials.share_of(config.load(None, words), Ranks(2, 3, torch.device("cpu")))
    assert share == Share(2, 3, 24, 2, trains_last=last_batch == "train")
    with pytest.raises(ConfigError, match="does not divide over 5 ranks"):
        materials.share_of(config.load(None, words), Ranks(2, 5, torch.device("cpu")))


@pytest.mark.parametrize(("method", "views"), [("scinet", 3), ("scpnet", 2), ("bce", 1)])
def test_training_batches_have_the_views_of_the_method_and_the_runs_mask(method: str, views: int) -> None:
    options = config.load(None, [*small_runs.SMALL, f"method={method}", "seed=3"])
    made = small_runs.materials(options)
    share = Share(0, 1, 6, 1)
    batch = next(iter(made.training(options, share).epoch(0)))
    assert len(batch.inputs) == 6 * views
    assert 0 < int((batch.observed != 0).sum()) < int((batch.truth != 0).sum())
    others = next(iter(made.training(config.replace(options, seed=4), share).epoch(0)))
    assert others.ids != batch.ids
    same = next(iter(made.training(config.replace(options, data__mask_seed=1), share).epoch(0)))
    assert same.ids == batch.ids
    assert not torch.equal(same.observed, batch.observed)


def test_zero_shot_classifier_has_the_prompt_head_whatever_is_trained() -> None:
    options = config.load(None, [*small_runs.SMALL, "model.head=linear"])
    made = small_runs.materials(options)
    assert made.network(options).head is not None
    network = made.zero_shot(options)
    assert network.head is None
