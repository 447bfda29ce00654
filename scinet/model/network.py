"""The trained network: images (or cached features) to logits, with the frozen towers held aside.

Frozen towers are no sub-modules: the engine neither partitions nor saves them, student and teacher share them, and a
checkpoint stores their hash instead. Shapes: N images or views, F features, R regions, C classes, D embedding.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scinet.errors import ConfigError
from scinet.model import heads
from scinet.model import regions as regions_of
from scinet.model.backbone import Backbone, ImageTower, TextTower
from scinet.model.label_graph import LabelGraph, adjacency, text_correlation
from scinet.model.prompter import CrossAttention, Prompter
from scinet.model.recomputing import recompute_blocks
from scinet.options import BiDominant, Head, ModelOptions

_SHORTEST = 1e-12  # as torch's normalize


class Output(NamedTuple):
    """Logits [N, C] and unit image embeddings [N, D], both fp32.

    Where the head compares regions with text, also the embeddings of regions [N, R, D], of some length, and the unit
    embeddings of classes [C, D].
    """

    logits: Tensor
    embeddings: Tensor
    regions: Tensor | None = None
    text: Tensor | None = None


@dataclass(frozen=True)
class Frozen:
    """Towers that never train: the text tower, and the image trunk where ``model.freeze_image``."""

    text: TextTower
    trunk: ImageTower | None


class Network(nn.Module):
    """SCINet's classifier z = s cos(f, t) + b on a backbone (method.md section 2), or another head (``model.head``)."""

    def __init__(self, backbone: Backbone, class_names: tuple[str, ...], options: ModelOptions, *, top_k: int) -> None:
        """Assemble the trainable parts.

        Args:
            backbone: pretrained towers; taken over, not copied.
            class_names: C names.
            options: the ``model`` section.
            top_k: entries kept in a row of the label graph.

        Raises:
            ConfigError: if the attention heads do not divide the embedding width, or the head needs regions that the
                image tower does not show.
        """
        super().__init__()
        is_late = options.head is Head.prompt and options.bi_dominant is BiDominant.late
        if (is_late or options.head is Head.ml_decoder) and backbone.width % options.attention_heads:
            raise ConfigError(
                f"model.attention_heads is {options.attention_heads}, expected a divisor of the embedding width "
                f"{backbone.width} of {backbone.name}"
            )
        if options.head.needs_regions and not backbone.image.shows_regions:
            raise ConfigError(
                f"'model.head={options.head.value}' looks at the regions of an image, which the image tower of "
                f"'model.backbone={backbone.name}' does not show: set another head, or another backbone"
            )
        freezes = options.freeze_image
        self.frozen = Frozen(backbone.text, backbone.image if freezes else None)
        if freezes:
            backbone.image.trunk.requires_grad_(False)
        self.image = None if freezes else copy.deepcopy(backbone.image)
        self.projection = copy.deepcopy(backbone.image.projection) if freezes else None
        if options.activation_checkpointing:
            recompute_blocks(backbone.text)
            if self.image is not None:
                recompute_blocks(self.image)
        self.prompter = Prompter(backbone.text, class_names, options)
        is_prompted = options.head.is_prompted
        self.label_graph = LabelGraph(backbone.width) if is_prompted and options.label_graph else None
        self.attend_text = CrossAttention(backbone.width, options.attention_heads) if is_late else None
        self.attend_image = CrossAttention(backbone.width, options.attention_heads) if is_late else None
        self.bias = nn.Parameter(torch.zeros(len(class_names))) if options.learned_bias else None
        self.scale = options.logit_scale or backbone.logit_scale
        if is_prompted:
            self.register_buffer("graph", adjacency(text_correlation(self.class_text), top_k), persistent=True)
        self.head = heads.build(options, self.class_text, self.prompter.words(backbone.text, options.context))
        self._needs_regions = options.head.needs_regions

    @property
    def class_text(self) -> Tensor:
        """Embeddings of the class names as they are, whatever the head: [C, D] fp32, a buffer that is saved."""
        return self.prompter.get_buffer("fixed")

    def texts(self) -> Tensor:
        """Return the text embeddings that a step computes, not normalised: [C, D] fp32, [2, C, D] of ``dualcoop``."""
        if isinstance(self.head, heads.DualPromptHead):
            return self.head.texts(self._read)
        text: Tensor = self.prompter(self.frozen.text)
        return text

    def _read(self, context: Tensor) -> Tensor:
        return self.prompter.read(self.frozen.text, context)

    def clone(self) -> Network:
        """Return an independent copy that shares the frozen towers; for the teacher."""
        return copy.deepcopy(self, {id(self.frozen): self.frozen})

    def train(self, mode: bool = True) -> Network:
        """Switch to training, batch norm excepted: one rank's statistics would break world-size invariance."""
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        return self

    def extract(self, images: Tensor, *, side: int = 0) -> Tensor:
        """Return the features of the frozen trunk for the cache, fp32.

        Computed in bf16 where the hardware has it: two to three times as fast (``natively_bf16``).

        Args:
            images: [N, 3, H, W].
            side: g of ``data.cached_regions``.

        Returns:
            the pooled features [N, F]; where g > 0 [N, 1 + g^2, F], those of regions after the pooled ones.

        Raises:
            ConfigError: if the tower shows fewer regions.
        """
        tower = self.frozen.trunk
        assert tower is not None, "only a frozen trunk has features worth caching"
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=natively_bf16(images.device)):
            if not side:
                return tower.features(images)[0].float()
            pooled, shown = tower.regions(images)
            return torch.cat([pooled.unsqueeze(1), regions_of.pooled_to(shown, side)], dim=1).float()

    def forward(self, inputs: Tensor) -> Output:
        """Classify.

        Args:
            inputs: images [N, 3, H, W], or cached features [N, F] or [N, 1 + R, F] of a frozen trunk.
        """
        features, regions = self.embed(inputs)
        if self.head is not None:
            logits = self.head(features, regions, self._read)
            return Output(self._biased(logits), _unit(features.float()))
        text = self.prompter(self.frozen.text)
        if self.label_graph is not None:
            text = self.label_graph(text, self.get_buffer("graph"))
        image, text = _unit(features.float()), _unit(text)
        if self._needs_regions:
            assert regions is not None, "towers without regions are refused"
            # scaled, as the backward pass keeps them: unit vectors beside would be a copy more
            regions = self.scale * _unit(regions.float())
            return Output(self._biased(_mean_odds(regions @ text.T)), image, regions, text)
        if self.attend_text is None or self.attend_image is None:
            cosine = image @ text.T
        else:
            image, cosine = self._attend(image, text, regions)
        return Output(self._biased(self.scale * cosine), image)

    def _biased(self, logits: Tensor) -> Tensor:
        return logits if self.bias is None else logits + self.bias.float()

    def embed(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the image embeddings [N, D], not normalised, and those of their regions [N, R, D] where there are any.

        Args:
            inputs: as in :meth:`forward`.
        """
        tower = self.image if self.image is not None else self.frozen.trunk
        projection = self.projection if self.projection is not None else tower.projection  # type: ignore[union-attr]
        weight = next(projection.parameters(), None)
        if inputs.ndim == 2:
            features, regions = inputs, None
        elif inputs.ndim == 3:
            features, regions = inputs[:, 0], inputs[:, 1:]
        else:
            assert tower is not None
            dtype = next(tower.trunk.parameters()).dtype
            look = tower.regions if self._needs_regions else tower.features
            features, regions = look(inputs.to(dtype))
        dtype = features.dtype if weight is None else weight.dtype
        return projection(features.to(dtype)), None if regions is None else projection(regions.to(dtype))

    def _attend(self, image: Tensor, text: Tensor, regions: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self.attend_text is not None
        assert self.attend_image is not None
        informed = _unit(image + self.attend_text(image.unsqueeze(0), text.unsqueeze(0))[0])
        keys = image.unsqueeze(1)
        if regions is not None:
            keys = torch.cat([keys, _unit(regions.float())], dim=1)
        change = self.attend_image(text.unsqueeze(0), keys)
        return informed, _cosine_to_changed(informed, text, change)


def _cosine_to_changed(image: Tensor, text: Tensor, change: Tensor) -> Tensor:
    """Return cos(f_n, t_c + change_nc) [N, C] from unit images [N, D], text [C, D] and change [N, 1 or C, D].

    A change that all classes share (one key to attend to) needs no [N, C, D] tensor: its products are enough, and a
    step is several times as fast.
    """
    if change.shape[1] > 1:
        moved = text + change
        # divided after the product: three times as fast as unit vectors of every image and class
        length = torch.linalg.vector_norm(moved, dim=-1).clamp_min(_SHORTEST)
        cosine: Tensor = torch.einsum("nd,ncd->nc", image, moved) / length
        return cosine
    shared = change[:, 0]
    product = image @ text.T + (image * shared).sum(1, keepdim=True)
    squared = text.square().sum(1) + 2 * shared @ text.T + shared.square().sum(1, keepdim=True)
    return product / squared.clamp_min(1e-12).sqrt()


def _mean_odds(logits: Tensor) -> Tensor:
    """Return the logits [N, C] of an image whose odds are the mean of its regions' odds, from theirs [N, R, C]."""
    return torch.logsumexp(logits, dim=1) - math.log(logits.shape[1])


def natively_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bf16 without emulation."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported())


def _unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=-1)
