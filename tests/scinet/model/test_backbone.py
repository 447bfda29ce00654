"""A backbone that cannot be had is refused with the name that was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scinet.errors import ConfigError
from scinet.model import backbone
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


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_file_is_refused_when_it_holds_no_weights(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    message = _refusal(tmp_path, "ViT-S-32-alt", str(path))
    assert str(path) in message
    assert "cannot be had" in message


@pytest.mark.slow
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
