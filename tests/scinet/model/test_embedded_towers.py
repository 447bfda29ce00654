"""The embedded towers against timm and transformers, as open_clip assembles them; the debug towers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scinet.model import backbone, embedded, embedded_towers
from scinet.model.backbone import Backbone
from scinet.options import ModelOptions
from scinet.paths import cache_directory

TEXTS = (
    "a cat",
    "a much longer text about a dog, and another one; with Capitals and Ümlauts",
    "two  spaces <br> &amp;amp; html",
    "snow-capped [SEP] mountain",
    "日本",
    " ".join(["word"] * 40),
)


@pytest.fixture(scope="module")
def towers() -> tuple[Any, Any, Any, Any]:
    """Ours and open_clip's towers of one folder, each with its tokenizer."""
    import open_clip

    folder = embedded.ensure(cache_directory())
    ours, read = embedded.load(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        theirs = open_clip.create_model(f"local-dir:{folder}").eval()
        return ours.eval(), read, theirs, open_clip.get_tokenizer(f"local-dir:{folder}")


def test_weights_have_the_names_of_open_clip(towers: Any) -> None:
    ours, _, theirs, _ = towers
    assert list(ours.visual.state_dict()) == list(theirs.visual.state_dict())
    assert list(ours.text.state_dict()) == list(theirs.text.state_dict())


@pytest.mark.parametrize("size", [64, 97])
def test_image_tower_is_timms_bit_for_bit(towers: Any, size: int) -> None:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
    outputs = []
    for model in (towers[0], towers[2]):
        trunk, own = model.visual.trunk, images.clone().requires_grad_()
        pooled = trunk(own)
        pooled.square().sum().backward()
        outputs.append((trunk.forward_features(images), pooled, own.grad, trunk.conv_stem.weight.grad.clone()))
        model.zero_grad()
    assert all(torch.equal(got, want) for got, want in zip(*outputs, strict=True))


def test_text_tower_and_tokenizer_are_transformers_bit_for_bit(towers: Any) -> None:
    ours, read, theirs, their_read = towers
    tokens = read(TEXTS)
    assert torch.equal(tokens, their_read(list(TEXTS)))
    with torch.no_grad():
        assert torch.equal(ours.encode_text(tokens), theirs.encode_text(tokens))


def test_towers_are_aligned_by_whole_descriptions_though_prompts_are_shorter(towers: Any) -> None:
    folder = embedded.ensure(cache_directory())
    tokens = embedded._class_tokens(folder)
    ends = (tokens == towers[1](["a"])[0, 2]).int()  # what ends a text
    assert tokens.shape == (1000, 35)
    assert (ends.sum(1) == 1).all()
    assert int(ends.argmax(1).max()) == 34


def _debug() -> Backbone:
    return backbone.load(ModelOptions(backbone=backbone.DEBUG), cache_directory())


def test_debug_towers_are_small_and_the_same_each_time() -> None:
    state = torch.random.get_rng_state()
    first, second = _debug(), _debug()
    assert torch.equal(torch.random.get_rng_state(), state), "loading draws no random number of the run"
    assert first.weights_sha256 == "debug:random"
    for own, other in ((first.image, second.image), (first.text, second.text)):
        assert sum(weight.numel() for weight in own.parameters()) < 50_000
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))
    pooled, regions = first.image.regions(torch.zeros(2, 3, 64, 64))
    assert (pooled.shape, regions.shape) == ((2, 48), (2, 64, 48))
    texts = first.text(first.text.tokenize(["a cat", "a cat", "fire engine"]))
    assert texts.shape == (3, first.width)
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_hashed_words_begin_and_end_each_text() -> None:
    rows = embedded_towers.HashedWords(512, 6)(["A cat", "a CAT sat on the mat"])
    assert rows[0, 0] == rows[1, 0] == 1
    assert rows[0].tolist() == [1, *rows[1, 1:3].tolist(), 2, 0, 0]
    assert rows[1, 5] == 2
    assert rows.max() < 512
