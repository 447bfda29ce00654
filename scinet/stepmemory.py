"""The memory of a training step on one rank, by arithmetic: it takes milliseconds, and no tensor is made.

Towers are counted module by module (:mod:`scinet.model.activations`), the fusion's kernels state themselves what they
take. What heads, confidence and loss hold is written down here term by term, and held against the rehearsal of the same
step (:mod:`scinet.rehearsal`) by ``tests/scinet/test_stepmemory.py``: in all within 15 % of it.

Shapes: B samples of this rank, N = B x views images, G samples of the global batch, M bank rows, C classes, R regions,
F features, D embedding, K queries of the decoder head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn

from scinet.data.share import share_of
from scinet.engine import uses_bf16
from scinet.model import activations, heads
from scinet.model.activations import Pass
from scinet.model.backbone import Backbone
from scinet.options import BiDominant, Combine, Head, Method, ModelOptions, Options, Profile, Prompt
from scinet.zoo.catalogue import sees_everyone
from scinet_kernels import estimate as kernel_cost

_FP32, _INDEX = 4, 8
_NUM_LONGEST = 16  # names that are tokenised: of the longest, one has the most tokens
_LOSS_CELLS = 40  # numbers that losses keep or make for each label of a sample


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step on one rank, as if nothing were partitioned.

    layers: elements of each trainable parameter, by the module that owns it. element_size: bytes of one while it
    trains. teacher: its own weights and buffers. gathered: what the teacher saw on all ranks, for the whole step. text,
    student: what forward keeps for backward, of the prompts and of everything else. fusion, backward: the highest
    points above all of these while the confidence and the loss are formed, and in backward.
    """

    layers: tuple[tuple[int, ...], ...]
    element_size: int
    teacher: int
    text: int
    student: int
    gathered: int
    fusion: int
    backward: int

    @property
    def num_parameters(self) -> int:
        """Trainable elements."""
        return sum(sum(layer) for layer in self.layers)


def step_memory(
    options: Options, backbone: Backbone, class_names: tuple[str, ...], *, world_size: int, device: torch.device
) -> StepMemory:
    """Return what a step would take.

    Args:
        options: the whole configuration.
        backbone: towers, anywhere: they lend their sizes.
        class_names: C names.
        world_size: ranks that share the global batch.
        device: where the run would be, which decides precision and kernels; it need not be there.

    Raises:
        ConfigError: if the global batch does not divide.
    """
    return _Step(options, backbone, class_names, world_size, device).memory()


class _Taken(NamedTuple):
    """Bytes: kept for backward, and the highest points above that on the way there and in backward."""

    kept: int
    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class _Step:
    options: Options
    backbone: Backbone
    class_names: tuple[str, ...]
    world_size: int
    device: torch.device

    def memory(self) -> StepMemory:
        text, image, head = self._text(), self._image(), self._head()
        kept = text.kept + image.kept + head.kept
        loss = _FP32 * _LOSS_CELLS * self._samples * self._num_classes
        # the teacher and frozen towers pass before the student keeps all that it will
        passing = max(0, self._passing() - kept)
        return StepMemory(
            layers=tuple(self._layers(self.options.model)),
            element_size=self._element_size,
            teacher=self._teacher(),
            text=text.kept,
            student=image.kept + head.kept,
            gathered=self._gathered(),
            fusion=max(text.forward, head.forward, passing, loss + self._fusing()),
            backward=loss + max(text.backward, image.backward, head.backward),
        )

    @cached_property
    def _samples(self) -> int:
        return share_of(self.options, 0, self.world_size).micro_batch_size

    @property
    def _num_images(self) -> int:
        return self._samples * len(self.options.method.views)

    @property
    def _num_classes(self) -> int:
        return len(self.class_names)

    @property
    def _element_size(self) -> int:
        return 2 if uses_bf16(self.options, self.device) else _FP32

    @cached_property
    def _num_tokens(self) -> int:
        longest = sorted(self.class_names, key=len)[-_NUM_LONGEST:]
        context = self.options.model.context
        return self.backbone.text.tokenize([f"{context} {name.replace('_', ' ')}." for name in longest]).shape[1]

    @cached_property
    def _prompt_pass(self) -> Pass:
        return activations.of_prompt(self.backbone.text, self._num_tokens)

    @cached_property
    def _image_pass(self) -> Pass:
        return activations.of_image(self.backbone.image.trunk, self.options.model.image_size)

    @cached_property
    def _num_regions(self) -> int:
        """R that a step's network sees; 0 without any."""
        data, model = self.options.data, self.options.model
        if data.cache_features:
            return data.cached_regions**2
        has_map = getattr(self.backbone.image.trunk, "feature_info", None) is not None
        return self._image_pass.side**2 if has_map or model.head.needs_regions else 0

    def _text(self) -> _Taken:
        if not _reads_prompts(self.options.model):
            return _Taken(0)
        found, size = self._prompt_pass, _FP32 * self._num_classes
        times = 2 if self.options.model.head is Head.dualcoop else 1
        forward, backward = size * found.largest * 5 // 4, size * found.largest * 2
        if self.options.model.activation_checkpointing:
            return _Taken(times * size * found.inputs, forward, backward + size * found.recomputed)
        return _Taken(times * size * found.kept, forward, backward)

    def _image(self) -> _Taken:
        """Return what the trunk takes, where it trains."""
        model = self.options.model
        if model.freeze_image:
            return _Taken(0)
        found, size = self._image_pass, self._element_size * self._num_images
        if model.activation_checkpointing:
            return _Taken(size * found.inputs, 0, size * found.recomputed)
        return _Taken(size * found.kept)

    def _passing(self) -> int:
        """Return the highest point of passes that keep nothing, where an output is largest."""
        model, highest = self.options.model, 0
        if not self.options.data.cache_features:
            keeps_little = model.freeze_image or model.activation_checkpointing
            # a convolution's input and output, what the norm and the activation make of it
            highest = self._image_pass.largest * (self._num_images if keeps_little else self._samples) * 7 // 2
        asks_untrained = self.options.method is Method.vlpl and _reads_prompts(heads.untrained(model))
        if asks_untrained or _reads_prompts(model):
            # a linear layer's input and output, the activation, and what they will be added to
            highest = max(highest, self._prompt_pass.largest * self._num_classes * 11 // 4)
        return _FP32 * highest

    def _head(self) -> _Taken:
        """Return what is taken behind the trunk: projection, head, and the label graph.

        A product that trains keeps both factors, a unit vector the vector that it was made of.
        """
        model = self.options.model
        images, classes, width, regions = self._num_images, self._num_classes, self.backbone.width, self._num_regions
        image, text, seen = images * width, classes * width, images * regions * width
        cells = images * regions * classes
        # regions lie scattered in what the trunk or the cache gives: the projection copies them
        scattered = images * regions * self.backbone.feature_width
        kept, forward, backward = 2 * image, 0, 0  # embeddings, and on unit length
        if not self.options.data.cache_features:
            kept += images * self.backbone.feature_width
        if model.head.is_prompted:
            # the graph: its input, and twice two tensors that are 2 D wide
            kept += 2 * text + (9 * text if model.label_graph else 0)
        if model.head is Head.prompt and model.bi_dominant is BiDominant.late:
            # keys and values of classes; queries, answers, gates, sums and products of images
            kept += 9 * image + 4 * images * classes + 2 * text
            if regions:  # every class attends to the regions of every image: N x C x D answers, gates and sums
                kept += 3 * (image + seen) + 3 * images * text + scattered + seen
                forward, backward = images * text, 3 * images * text
        elif model.head is Head.prompt_regions:
            kept, backward = kept + scattered + 2 * seen + 2 * cells, 4 * seen
        elif model.head is Head.cam:
            kept, backward = kept + scattered + seen + cells, seen + cells
        elif model.head is Head.dualcoop:
            kept, backward = kept + scattered + 3 * seen + 4 * cells, 2 * seen
        elif model.head is Head.ml_decoder:
            queries = images * self._num_queries
            # embedded regions, keys and values; around the attention, norms and the layer inside
            narrow = scattered + 4 * seen + queries * (5 * width + heads.HIDDEN)
            forward, backward = queries * max(0, heads.HIDDEN - 2 * width), 2 * queries * heads.HIDDEN
            size = self._element_size  # of what this head's own layers take
            return _Taken(_FP32 * kept + size * narrow, size * forward, size * backward)
        else:
            forward = scattered + seen  # projected, not looked at
        return _Taken(_FP32 * kept, _FP32 * forward, _FP32 * backward)

    def _gathered(self) -> int:
        """Return what travelled between ranks, as it came and by columns, and this rank's own."""
        rows, classes, width = self.options.train.global_batch_size, self._num_classes, self.backbone.width
        if self.options.method is not Method.scinet:
            return rows * (5 * classes + _INDEX) if sees_everyone(self.options.method) else 0
        own = _FP32 * (classes + width)
        return 2 * rows * (own + classes + _INDEX) + (self._samples * own if rows > self._samples else 0)

    def _fusing(self) -> int:
        """Return the highest point of the confidence: candidates and kernels, or the label term."""
        options, samples, classes = self.options, self._samples, self._num_classes
        if options.method is not Method.scinet or options.profile is Profile.release or not options.fusion.enabled:
            return 0
        width, rows = self.backbone.width, options.train.global_batch_size + options.fusion.bank_size
        is_linear = options.fusion.combine is Combine.linear
        columns = classes if is_linear else 2 * classes
        kernel = kernel_cost("gaussian_propagate", (samples, rows, width, columns), torch.float32, self.device)
        # labels, and the columns that are propagated, once more as the parts that they are put together from
        row = _FP32 * width + _INDEX + classes + _FP32 * (classes if is_linear else 2 * columns)
        highest = rows * row + kernel.workspace_bytes
        if not is_linear and options.fusion.label_weight:
            # R, and of every sample R + V and its Cholesky factor
            highest = max(highest, _FP32 * (2 * samples + 3) * classes**2)
        return highest

    def _teacher(self) -> int:
        copied = self._copied(self.options.model)
        if self.options.method is Method.vlpl:  # the untrained network that it asks
            copied += self._copied(heads.untrained(self.options.model))
        return copied

    def _copied(self, model: ModelOptions) -> int:
        """Return the bytes of a network in fp32, frozen towers apart."""
        classes = self._num_classes
        found = _FP32 * sum(sum(layer) for layer in self._layers(model))
        found += classes * (_FP32 * self.backbone.width + _INDEX * self._num_tokens)
        if model.head.is_prompted:
            found += _FP32 * classes**2
        if not model.freeze_image:
            found += sum(buffer.nbytes for buffer in self.backbone.image.buffers())
        if model.head is Head.ml_decoder:
            found += _FP32 * self._num_queries * self.backbone.width
        return found

    def _layers(self, model: ModelOptions) -> Iterator[tuple[int, ...]]:
        """Yield the elements of each module's own trainable parameters."""
        image = self.backbone.image
        for module in (image.projection if model.freeze_image else image).modules():
            own = tuple(p.numel() for p in module.parameters(recurse=False) if p.requires_grad)
            if own:
                yield own
        classes, width = self._num_classes, self.backbone.width
        if model.learned_bias:
            yield (classes,)
        if model.head.is_prompted and model.prompt is Prompt.learned:
            yield (self._num_words,)
        if model.head.is_prompted and model.label_graph:
            yield from ((times * width**2,) for times in (2, 4, 2))
        if model.head is Head.prompt and model.bi_dominant is BiDominant.late:
            yield from 2 * [(1,), *(4 * [(width**2,)])]
        elif model.head in (Head.linear, Head.cam):
            yield (classes * width,)
        elif model.head is Head.dualcoop:
            yield (self._num_words, self._num_words)
        elif model.head is Head.ml_decoder:
            yield from 5 * [(width**2, width)] + 3 * [(width, width)]
            yield from ((heads.HIDDEN * width, heads.HIDDEN), (heads.HIDDEN * width, width))
            group = math.ceil(classes / min(classes, model.decoder_groups))
            yield (self._num_queries * width * group,)

    @property
    def _num_queries(self) -> int:
        """K, of groups of classes as large as each other."""
        classes = self._num_classes
        return math.ceil(classes / math.ceil(classes / min(classes, self.options.model.decoder_groups)))

    @cached_property
    def _num_words(self) -> int:
        """Elements of the words that prompts begin with: [m, W]."""
        text = self.backbone.text
        width = next(part.embedding_dim for part in text.modules() if isinstance(part, nn.Embedding))
        return text.count_words(self.options.model.context) * width


def _reads_prompts(model: ModelOptions) -> bool:
    """Return whether a step passes the prompts through the text tower."""
    return model.head is Head.dualcoop or (model.head.is_prompted and model.prompt is Prompt.learned)
