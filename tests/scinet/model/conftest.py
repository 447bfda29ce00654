"""A backbone small enough to compute by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from scinet.data.views import Normalisation
from scinet.model.backbone import Backbone, ImageTower, TextTower

WIDTH, FEATURES, WORDS = 8, 6, 5
MakeBackbone = Callable[..., Backbone]


class _Text(nn.Module):
    """A prompt is the codes of its words; its embedding a frozen map of their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, WORDS)
        self.out = nn.Linear(WORDS, WIDTH)
        self.requires_grad_(False)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        rows = [[1, *(3 + sum(map(ord, word)) % 900 for word in text.split()), 2] for text in texts]
        length = max(map(len, rows))
        return torch.tensor([row + [0] * (length - len(row)) for row in rows])

    def count_words(self, context: str) -> int:
        return len(context.split())

    def embed(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self(tokens).float()

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.table(tokens))

    def forward(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        words = self.embed_tokens(tokens)
        if context is not None:
            shared = context.expand(len(words), -1, -1)
            words = torch.cat([words[:, :1], shared, words[:, 1 + len(context) :]], dim=1)
        return cast(Tensor, self.out(words.tanh().mean(1)))


class _Trunk(nn.Module):
    """A convolution with batch norm, with or without a feature map that can be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, FEATURES, 4, stride=4)
        self.norm = nn.BatchNorm2d(FEATURES)

    def forward_features(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.conv(images)))

    def forward_head(self, grid: Tensor) -> Tensor:
        return grid.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def small_backbone(seed: int = 0, *, has_regions: bool = True) -> Backbone:
    """Towers of random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        image = ImageTower(_Trunk(), nn.Linear(FEATURES, WIDTH, bias=False), has_regions=has_regions).eval()
        text = cast(TextTower, _Text())
    normalisation = Normalisation((0.5,) * 3, (0.5,) * 3)
    return Backbone(image, text, FEATURES, WIDTH, 20.0, normalisation, "stub", "0" * 64)


@pytest.fixture
def make_backbone() -> MakeBackbone:
    """``make_backbone(seed, has_regions)``: towers of random weights."""
    return small_backbone
