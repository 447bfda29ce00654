"""What a run is made from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import nn

from scinet import config, materials
from scinet.data.share import Share, share_of
from scinet.errors import ConfigError
from scinet.model.backbone import Backbone, ImageTower
from tests.scinet import small_runs


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


@pytest.mark.parametrize("last_batch", ["drop", "train"])
def test_share_of_a_rank_is_the_configured_one(last_batch: str) -> None:
    words = ["train.global_batch_size=24", "train.accumulation_steps=2", f"train.last_batch={last_batch}"]
    share = share_of(config.load(None, words), 2, 3)
    assert share == Share(2, 3, 24, 2, trains_last=last_batch == "train")
    with pytest.raises(ConfigError, match="does not divide over 5 ranks"):
        share_of(config.load(None, words), 2, 5)


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
