"""What is said about the data before a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
from torch import nn

from scinet import config, materials
from scinet.errors import ConfigError
from scinet.model.backbone import Backbone, ImageTower
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
