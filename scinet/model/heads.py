"""Heads beside the prompt classifier: from an image's embeddings to logits, without the bias that the network adds.

Shapes: N images or views, R regions, C classes, D embedding, G groups, m context vectors, W token width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from scinet.options import BiDominant, Head, ModelOptions

Read = Callable[[Tensor], Tensor]
HIDDEN = 2048  # of ML-Decoder's feed-forward, as in the source
_TEMPERATURE, _GAIN = 20.0, 5.0  # DualCoOp's, as in its code
_BESIDE = 0.1  # how far its negative context starts from the words, in their standard deviations


class LinearHead(nn.Module):
    """logits = W f + b on the image embedding, as it comes out of the projection."""

    def __init__(self, width: int, num_classes: int) -> None:
        """Draw W."""
        super().__init__()
        self.weight = nn.Parameter(_drawn(num_classes, width, fan_in=width))

    def forward(self, image: Tensor, regions: Tensor | None, read: Read) -> Tensor:
        """Return the logits [N, C] fp32.

        Args:
            image: [N, D], not normalised.
            regions: not looked at.
            read: not used.
        """
        return nn.functional.linear(image.float(), self.weight.float())


class _RegionHead(nn.Module):
    """A head that looks at nothing but the regions of an image, [N, R, D], not normalised."""

    def forward(self, image: Tensor, regions: Tensor | None, read: Read) -> Tensor:
        """Return the logits [N, C] fp32.

        Args:
            image: not looked at.
            regions: [N, R, D], not normalised.
            read: from a context [m, W] to the text embeddings [C, D] of all classes.
        """
        assert regions is not None, "the network refuses towers without regions"
        return self._of_regions(regions, read)

    def _of_regions(self, regions: Tensor, read: Read) -> Tensor:
        raise NotImplementedError


class ActivationHead(_RegionHead):
    """Class activation maps M = W r of every region, averaged: logit_c = mean_r B(M_rc) + b.

    B multiplies positive values with alpha: BoostLU (Kim et al., CVPR 2023) for alpha = 5, nothing for 1. The source
    boosts where it trains with the large-loss methods; here alpha is part of the head, in training and evaluation alike
    and whatever the loss, the maps are of projected regions, and b is not boosted with them, as its code does.
    """

    def __init__(self, width: int, num_classes: int, alpha: float) -> None:
        """Draw W, a 1 x 1 convolution."""
        super().__init__()
        self.weight = nn.Parameter(_drawn(num_classes, width, fan_in=width))
        self._alpha = alpha

    def _of_regions(self, regions: Tensor, read: Read) -> Tensor:
        maps = nn.functional.linear(regions.float(), self.weight.float())
        return torch.where(maps > 0, self._alpha * maps, maps).mean(1)


class DecoderHead(_RegionHead):
    """ML-Decoder (Ridnik et al., WACV 2023): fixed queries attend to the regions, and each answers for its classes.

    One layer without self-attention: h = LN(q); h = LN(h + Attn(h, keys = values = ReLU(V r))); h = LN(h + FF(h));
    logit_c = w_c . h_g(c) + b. There are G = min(C, ``model.decoder_groups``) queries; group g answers for ceil(C / G)
    classes in a row. Ours: the queries are the text embeddings of their classes (their mean in a group) instead of
    random ones, the width is the embedding's instead of 768, the heads ``model.attention_heads`` instead of 8, LN(q)
    stands for its code's LN(q + q), and there is no dropout, whose draws would depend on the ranks.
    """

    def __init__(self, text: Tensor, groups: int, heads: int) -> None:
        """Draw the weights.

        Args:
            text: [C, D], the classes' text embeddings.
            groups: most queries.
            heads: of the attention; divides D.
        """
        super().__init__()
        num_classes, width = text.shape
        self._num_classes, self._heads = num_classes, heads
        size = math.ceil(num_classes / min(groups, num_classes))
        unit = nn.functional.normalize(text.float(), dim=-1)
        self.register_buffer("queries", torch.stack([part.mean(0) for part in torch.split(unit, size)]))
        self.embed = nn.Linear(width, width)
        self.norm_query, self.norm_attended, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.inner, self.outer = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, width)
        self.groups = nn.Parameter(_drawn(len(self.get_buffer("queries")), width, size, fan_in=width))

    def _of_regions(self, regions: Tensor, read: Read) -> Tensor:
        dtype = self.embed.weight.dtype
        keys = torch.relu(self.embed(regions.to(dtype)))
        asked = self.norm_query(self.get_buffer("queries").to(dtype).unsqueeze(0))
        # the queries are the same for every image: projected once
        query = self._split(self.query(asked)).expand(len(keys), -1, -1, -1)
        attended = nn.functional.scaled_dot_product_attention(
            query, self._split(self.key(keys)), self._split(self.value(keys))
        )
        found = self.norm_attended(asked + self.out(attended.transpose(1, 2).flatten(2)))
        found = self.norm(found + self.outer(torch.relu(self.inner(found))))
        logits = torch.einsum("ngd,gdk->ngk", found.float(), self.groups.float())
        return torch.flatten(logits, 1)[:, : self._num_classes]

    def _split(self, x: Tensor) -> Tensor:
        """Return [N, K, D] by heads: [N, heads, K, D / heads]."""
        return x.view(*x.shape[:2], self._heads, -1).transpose(1, 2)


class DualPromptHead(_RegionHead):
    """DualCoOp (Sun et al., NeurIPS 2022): a positive and a negative learned prompt for every class, met by regions.

    With unit regions r and the texts t+, t- of a class: logit = 5 sum_r w_r 20 (cos(r, t+) - cos(r, t-)) + b, where w
    is the softmax over regions of 20 cos(r, t+). The source's two-way softmax of the pair is the sigmoid of that
    difference, without b (``model.learned_bias=false``).
    The contexts are shared by all classes, one of its two variants. Ours: both have as many vectors as there are words
    in ``model.context`` instead of 16, and start at these words instead of at random ones, the negative one a little
    beside them, so that every logit starts near b.
    """

    def __init__(self, words: Tensor) -> None:
        """Start from words [m, W]."""
        super().__init__()
        self.positive = nn.Parameter(words.clone())
        # not quite at the words: a pair of equals would teach the regions the rounding of zeros, which ranks differ in
        noise = torch.randn(words.shape).to(words.device)
        self.negative = nn.Parameter(words + _BESIDE * words.std() * noise)

    def texts(self, read: Read) -> Tensor:
        """Return the text embeddings of positive and negative prompts, not normalised: [2, C, D] fp32."""
        return torch.stack([read(self.positive), read(self.negative)]).float()

    def _of_regions(self, regions: Tensor, read: Read) -> Tensor:
        seen = nn.functional.normalize(regions.float(), dim=-1)
        positive, negative = nn.functional.normalize(self.texts(read), dim=-1)
        weights = torch.softmax(_TEMPERATURE * seen @ positive.T, dim=1)
        # the difference of texts, not of products: prompts that are near each other leave few digits of the latter
        return torch.sum(_GAIN * _TEMPERATURE * weights * (seen @ (positive - negative).T), dim=1)


def build(options: ModelOptions, text: Tensor, words: Tensor) -> nn.Module | None:
    """Return the configured head, or None for the prompt classifiers, which are the network's own.

    Args:
        options: the ``model`` section.
        text: [C, D], the classes' text embeddings.
        words: [m, W], the words that a learned context starts from.
    """
    num_classes, width = text.shape
    if options.head is Head.linear:
        return LinearHead(width, num_classes)
    if options.head is Head.cam:
        return ActivationHead(width, num_classes, options.boost_alpha)
    if options.head is Head.ml_decoder:
        return DecoderHead(text, options.decoder_groups, options.attention_heads)
    return DualPromptHead(words) if options.head is Head.dualcoop else None


def untrained(options: ModelOptions) -> ModelOptions:
    """Return the options of the zero-shot classifier: the prompt head, without the attention that starts at nothing."""
    if options.head is Head.prompt:
        return options
    return replace(options, head=Head.prompt, bi_dominant=BiDominant.none)


def _drawn(*shape: int, fan_in: int) -> Tensor:
    """Return a weight drawn as torch's linear layers draw theirs."""
    return torch.empty(shape).uniform_(-1, 1) / math.sqrt(fan_in)
