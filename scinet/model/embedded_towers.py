"""The two towers of the embedded default in plain torch: EfficientNet-Lite and a BERT sentence encoder.

timm and transformers have both, bit for bit (a test compares), but importing them takes several times as long as a
short run needs. Names of weights are theirs. The ``debug`` backbone is the same towers, small and with random weights.

Shapes: B images, N texts, T tokens, W token width, F image features.
"""

from __future__ import annotations

import html
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

Tokenizer = Callable[[Sequence[str]], Tensor]
_RELU6 = partial(nn.ReLU6, inplace=True)
PADDING = 0


class Stage(NamedTuple):
    """Blocks of one width: how many, kernel size, stride of the first, expansion of their inside, channels."""

    num_blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


# Tan and Le, EfficientNet, ICML 2019, Table 1, without squeeze and excitation
LITE0 = tuple(
    Stage(*row)
    for row in (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )
)


class SameConvolution(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow does: to ceil(size / stride), the odd pixel at the end."""

    def __init__(self, channels: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        """Pad in advance where the stride is 1, which needs no look at the image's size."""
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(channels, out, kernel, stride, padding, groups=groups, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the filtered images [B, C, ceil(H / stride), ceil(W / stride)]."""
        stride, kernel = self.stride[0], self.kernel_size[0]
        if stride > 1:
            rows, columns = (
                max((math.ceil(size / stride) - 1) * stride + kernel - size, 0) for size in images.shape[-2:]
            )
            images = functional.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return super().forward(images)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm and the activation after it, if any."""

    def __init__(self, channels: int, activation: nn.Module | None = None) -> None:
        """Take TensorFlow's epsilon."""
        super().__init__(channels, eps=1e-3)
        self.act = nn.Identity() if activation is None else activation

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalised images, activated."""
        activated: Tensor = self.act(super().forward(images))
        return activated


class DepthwiseBlock(nn.Module):
    """A depth-wise and a point-wise convolution."""

    def __init__(self, channels: int, stage: Stage, stride: int, activation: Callable[[], nn.Module]) -> None:
        """Take the number of input channels."""
        super().__init__()
        self.conv_dw = SameConvolution(channels, channels, stage.kernel, stride=stride, groups=channels)
        self.bn1 = BatchNorm(channels, activation())
        self.conv_pw = SameConvolution(channels, stage.channels, 1)
        self.bn2 = BatchNorm(stage.channels)
        self._has_skip = stride == 1 and channels == stage.channels

    def forward(self, images: Tensor) -> Tensor:
        """Return the block's output."""
        out: Tensor = self.bn2(self.conv_pw(self.bn1(self.conv_dw(images))))
        return out + images if self._has_skip else out


class InvertedResidual(nn.Module):
    """A point-wise expansion, a depth-wise convolution, a point-wise projection."""

    def __init__(self, channels: int, stage: Stage, stride: int, activation: Callable[[], nn.Module]) -> None:
        """Take the number of input channels."""
        super().__init__()
        inside = channels * stage.expansion
        self.conv_pw = SameConvolution(channels, inside, 1)
        self.bn1 = BatchNorm(inside, activation())
        self.conv_dw = SameConvolution(inside, inside, stage.kernel, stride=stride, groups=inside)
        self.bn2 = BatchNorm(inside, activation())
        self.conv_pwl = SameConvolution(inside, stage.channels, 1)
        self.bn3 = BatchNorm(stage.channels)
        self._has_skip = stride == 1 and channels == stage.channels

    def forward(self, images: Tensor) -> Tensor:
        """Return the block's output."""
        inside = self.bn2(self.conv_dw(self.bn1(self.conv_pw(images))))
        out: Tensor = self.bn3(self.conv_pwl(inside))
        return out + images if self._has_skip else out


class EfficientNetLite(nn.Module):
    """Images [B, 3, H, W] to features [B, F] of a map that can be asked for, as timm's trunks."""

    feature_info = ()
    """Present where a trunk has a feature map, as in timm."""

    def __init__(
        self,
        stages: Sequence[Stage] = LITE0,
        *,
        stem: int = 32,
        num_features: int = 1280,
        activation: Callable[[], nn.Module] = _RELU6,
    ) -> None:
        """Take the stages, the width of the first convolution and that of the features."""
        super().__init__()
        self.conv_stem = SameConvolution(3, stem, 3, stride=2)
        self.bn1 = BatchNorm(stem, activation())
        groups: list[nn.Module] = []
        channels = stem
        for stage in stages:
            blocks: list[nn.Module] = []
            for number in range(stage.num_blocks):
                kind = DepthwiseBlock if stage.expansion == 1 else InvertedResidual
                blocks.append(kind(channels, stage, stage.stride if number == 0 else 1, activation))
                channels = stage.channels
            groups.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*groups)
        self.conv_head = SameConvolution(channels, num_features, 1)
        self.bn2 = BatchNorm(num_features, activation())

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the feature map [B, F, H', W']."""
        grid: Tensor = self.bn2(self.conv_head(self.blocks(self.bn1(self.conv_stem(images)))))
        return grid

    def forward_head(self, grid: Tensor) -> Tensor:
        """Return the pooled features [B, F]."""
        return functional.adaptive_avg_pool2d(grid, 1).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the pooled features [B, F]."""
        return self.forward_head(self.forward_features(images))


@dataclass(frozen=True)
class BertSizes:
    """Of a BERT encoder; the defaults are all-MiniLM-L6-v2's."""

    width: int = 384
    num_layers: int = 6
    num_heads: int = 12
    inside: int = 1536
    vocabulary: int = 30522
    num_positions: int = 512


def _embedding(number: int, width: int) -> nn.Embedding:
    weight = torch.empty(number, width)
    # on `meta`, which draws nothing, the normal distribution alone would import half of torch's compiler
    return nn.Embedding(number, width, _weight=weight if weight.is_meta else weight.normal_())


class _Embeddings(nn.Module):
    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.word_embeddings = _embedding(sizes.vocabulary, sizes.width)
        self.position_embeddings = _embedding(sizes.num_positions, sizes.width)
        self.token_type_embeddings = _embedding(2, sizes.width)
        self.LayerNorm = nn.LayerNorm(sizes.width, eps=1e-12)

    def forward(self, tokens: Tensor) -> Tensor:
        # all tokens are of the first type; added in BERT's order, which decides the last digit
        words = self.word_embeddings(tokens) + self.token_type_embeddings(torch.zeros_like(tokens))
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        embedded: Tensor = self.LayerNorm(words + self.position_embeddings(positions))
        return embedded


class _SelfAttention(nn.Module):
    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(sizes.width, sizes.width) for _ in range(3))
        self._num_heads = sizes.num_heads

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            project(hidden).view(*hidden.shape[:2], self._num_heads, -1).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return attended.transpose(1, 2).reshape(hidden.shape)


class _Output(nn.Module):
    """A projection, added to what came in, normalised."""

    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inside, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, change: Tensor, hidden: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dense(change) + hidden)
        return out


class _Layer(nn.Module):
    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        attention = {"self": _SelfAttention(sizes), "output": _Output(sizes.width, sizes.width)}
        self.attention = nn.ModuleDict(attention)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(sizes.width, sizes.inside)})
        self.output = _Output(sizes.inside, sizes.width)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = self.attention["output"](self.attention["self"](hidden, mask), hidden)
        out: Tensor = self.output(functional.gelu(self.intermediate["dense"](hidden)), hidden)
        return out


class SentenceEncoder(nn.Module):
    """Tokens [N, T] to the mean of their last hidden states [N, W]; padding counts for nothing."""

    is_trimmable = True
    """Whether shorter rows of tokens are read as their padded selves."""

    def __init__(self, sizes: BertSizes) -> None:
        """Make an encoder of random weights."""
        super().__init__()
        layers = nn.ModuleList(_Layer(sizes) for _ in range(sizes.num_layers))
        self.transformer = nn.ModuleDict(
            {"embeddings": _Embeddings(sizes), "encoder": nn.ModuleDict({"layer": layers})}
        )

    @property
    def token_embedding(self) -> nn.Module:
        """The embedding of words alone."""
        return self.transformer["embeddings"].word_embeddings  # type: ignore[return-value]

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the embeddings [N, W]."""
        is_word = tokens != PADDING
        mask = is_word[:, None, None, :].expand(-1, -1, tokens.shape[1], -1)
        hidden = self.transformer["embeddings"](tokens)
        for layer in self.transformer["encoder"]["layer"]:  # type: ignore[index]
            hidden = layer(hidden, mask)
        weight = is_word.long().unsqueeze(-1)
        mean: Tensor = (hidden * weight).sum(dim=1) / weight.sum(1)
        return mean


class WordPieces:
    """The tokenizer of a model's folder: rows of one length, truncated or padded."""

    def __init__(self, path: Path, length: int) -> None:
        """Read ``tokenizer.json``."""
        from tokenizers import Tokenizer as Pieces

        self._pieces = Pieces.from_file(str(path))
        self._pieces.enable_truncation(length)
        self._pieces.enable_padding(length=length, pad_id=PADDING)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the token ids [N, T] int64."""
        import ftfy

        cleaned = [" ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()) for text in texts]
        return torch.tensor([row.ids for row in self._pieces.encode_batch(cleaned)])


class HashedWords:
    """A tokenizer without a vocabulary: a word is its checksum; 1 begins and 2 ends a text."""

    def __init__(self, vocabulary: int, length: int) -> None:
        """Take the number of ids and the length of a row."""
        self._vocabulary, self._length = vocabulary, length

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the token ids [N, T] int64."""
        rows = torch.full((len(texts), self._length), PADDING)
        for row, text in zip(rows, texts, strict=True):
            words = [3 + zlib.crc32(word.encode()) % (self._vocabulary - 3) for word in text.lower().split()]
            ids = torch.tensor([1, *words[: self._length - 2], 2])
            row[: len(ids)] = ids
        return rows


class Towers(nn.Module):
    """Both towers, with the attributes of an open_clip model that the backbone asks for."""

    def __init__(
        self, trunk: EfficientNetLite, num_features: int, sizes: BertSizes, pixels: dict[str, Sequence[float]]
    ) -> None:
        """Put a projection from features to the text's width after the trunk; pixels: their mean and std."""
        super().__init__()
        visual: Any = nn.Module()
        visual.preprocess_cfg = pixels
        visual.trunk = trunk
        visual.head = nn.ModuleDict({"proj": nn.Linear(num_features, sizes.width, bias=False)})
        self.visual = visual
        self.text = SentenceEncoder(sizes)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return the text embeddings [N, D]."""
        embeddings: Tensor = self.text(tokens)
        return embeddings


def debug() -> tuple[Towers, Tokenizer]:
    """Return small towers of random weights, the same each time, and their tokenizer."""
    sizes = BertSizes(width=32, num_layers=2, num_heads=4, inside=64, vocabulary=512, num_positions=24)
    stages = (Stage(1, 3, 1, 1, 8), Stage(1, 3, 2, 2, 16), Stage(1, 3, 2, 2, 32))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        # smooth activations: where rounding moves a value over a kink, gradients change by more than rounding
        trunk = EfficientNetLite(stages, stem=8, num_features=48, activation=nn.GELU)
        towers = Towers(trunk, 48, sizes, {"mean": (0.5,) * 3, "std": (0.5,) * 3})
    return towers, HashedWords(sizes.vocabulary, sizes.num_positions)
