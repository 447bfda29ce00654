"""A backbone that cannot be had is refused with the name that was meant; what towers show of an image."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scinet.errors import ConfigError
from scinet.model import backbone, regions
from scinet.model.backbone import ImageTower
from scinet.options import ModelOptions
from scinet.paths import cache_directory


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer at once that there is no hub, and take back the variables that ``load`` sets."""
    monkeypatch.setenv("HF_ENDPOINT", "https://127.0.0.1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def _refusal(tmp_path: Path, name: str, tag: str) -> str:
    with pytest.raises(ConfigError) as caught:
        backbone.load(ModelOptions(backbone=name, pretrained=tag), tmp_path)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("typed", "meant"), [("embeddd", "embedded"), ("RN11", "RN101"), ("vit-b-16", "ViT-B-16")])
def test_model_is_suggested_when_its_name_is_mistyped(tmp_path: Path, typed: str, meant: str) -> None:
    message = _refusal(tmp_path, typed, "openai")
    assert f"model.backbone='{typed}'" in message
    assert "did you mean" in message
    if typed != "RN11":
        assert f"'{meant}'" in message


def test_tag_is_suggested_when_mistyped(tmp_path: Path) -> None:
    message = _refusal(tmp_path, "RN101", "opnai")
    assert "model.pretrained='opnai' is neither a file nor a tag of RN101; did you mean 'openai'?" in message
    assert "yfcc15m" in message


@pytest.mark.parametrize("tag", ["weights/missing.pt", "", "embedded"])
def test_ways_out_are_named_when_the_weights_are_no_file(tmp_path: Path, tag: str) -> None:
    message = _refusal(tmp_path, "RN101", tag)
    assert f"model.pretrained='{tag}'" in message
    assert "model.backbone=embedded" in message


def test_embedded_towers_are_refused_when_other_weights_are_asked_for(tmp_path: Path) -> None:
    assert "model.pretrained is 'openai', but model.backbone=embedded" in _refusal(tmp_path, "embedded", "openai")


def test_folder_is_refused_when_it_holds_no_weights(tmp_path: Path) -> None:
    assert "holds no weights" in _refusal(tmp_path, f"local-dir:{tmp_path}", "")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_file_is_refused_when_it_holds_no_weights(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    message = _refusal(tmp_path, "ViT-S-32-alt", str(path))
    assert str(path) in message
    assert "cannot be had" in message


def test_embedded_towers_see_and_read_when_loaded() -> None:
    loaded = backbone.load(ModelOptions(), cache_directory())
    assert (loaded.name, len(loaded.weights_sha256)) == ("embedded", 64)
    with torch.no_grad():
        features, regions = loaded.image.features(torch.zeros(2, 3, 64, 64))
        text = loaded.text(loaded.text.tokenize(["a cat", "a much longer text about a dog"]))
    assert features.shape == (2, loaded.feature_width)
    assert regions is not None
    assert regions.shape[::2] == (2, loaded.feature_width)
    assert loaded.image.projection(features).shape == text.shape == (2, loaded.width)
    assert loaded.text.count_words("a photo of a") == 4
    assert not any(weight.requires_grad for weight in loaded.text.parameters())


def _small_clip(kind: str, image_size: int = 64) -> ImageTower:
    """A tower of open_clip's own CLIP, of random weights."""
    from open_clip import CLIP

    own: dict[str, Any] = {"layers": [1, 1, 1, 1], "width": 8} if kind == "resnet" else {"layers": 1, "width": 32}
    vision = {**own, "image_size": image_size, "head_width": 16, "patch_size": 32}
    text = {"context_length": 8, "vocab_size": 10, "width": 16, "heads": 2, "layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = CLIP(16, vision, text)
    model.visual.preprocess_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return backbone._split(model, None, ModelOptions(), "").image


@pytest.mark.parametrize("kind", ["resnet", "transformer"])
def test_clip_towers_show_regions_beside_what_they_return(kind: str) -> None:
    tower = _small_clip(kind)
    with torch.no_grad():
        images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        pooled, shown = tower.regions(images)
        plain, none = tower.features(images)
        assert none is None, "the prompt head sees what it has always seen"
        assert torch.equal(pooled, plain)
        assert shown.shape == (2, 4, 16)
        assert torch.equal(copy.deepcopy(tower).regions(images)[1], shown)
        # each region sees its own corner most
        changed = images.clone()
        changed[:, :, :32, :32] += 5
        moved = (tower.regions(changed)[1] - shown).norm(dim=2)
    assert (moved.argmax(1) == 0).all()


def test_resnet_pools_a_map_of_one_region_to_that_region() -> None:
    """Attention to a single place, where mean and place are one and positions are none, is its value, projected."""
    tower = _small_clip("resnet", image_size=32)
    pool: Any = tower.trunk.attnpool
    with torch.no_grad():
        pool.positional_embedding.zero_()
        pooled, shown = tower.regions(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(shown[:, 0], pooled, rtol=1e-4, atol=1e-5)


def test_regions_of_tokens_and_channels_last_are_rows_of_features() -> None:
    grid = torch.arange(2 * 3 * 4.0).view(1, 2, 3, 4)  # [B, F, H, W]
    want = torch.stack([grid[0, :, row, column] for row in range(3) for column in range(4)])
    channels_last, tokens = nn.Identity(), nn.Identity()
    channels_last.output_fmt, tokens.num_prefix_tokens = "NHWC", 1  # type: ignore[assignment]
    assert torch.equal(regions.of_map(nn.Identity(), grid)[0], want)
    assert torch.equal(regions.of_map(channels_last, grid.permute(0, 2, 3, 1))[0], want)
    assert torch.equal(regions.of_map(tokens, torch.cat([torch.ones(1, 2), want])[None])[0], want)


def test_tower_that_pools_by_attention_shows_no_regions() -> None:
    from open_clip.transformer import VisionTransformer

    sizes: Any = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "heads": 2, "mlp_ratio": 2.0}
    assert regions.reader(VisionTransformer(**sizes)) is not None
    assert regions.reader(VisionTransformer(**sizes, attentional_pool=True)) is None
    assert regions.reader(nn.Linear(1, 1)) is None
