"""What a run would hold on each rank, part by part, before it starts.

All of it is arithmetic, a matter of milliseconds: the step's in :mod:`scinet.stepmemory`, that of the data and of the
fusion's state in :mod:`scinet.estimating`. What DeepSpeed makes of the trainable weights is written down here, from its
source and held against it by a test (``tests/system/test_memory.py``).

Shapes: P trainable elements, R ranks, N samples, C classes.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scinet import estimating
from scinet.engine import zero_config
from scinet.estimating import DataSize, Need
from scinet.model import features
from scinet.model.backbone import Backbone
from scinet.options import Options
from scinet.stepmemory import StepMemory, step_memory
from scinet.texttable import size, table

CACHED = "reading: cached features"
_FP32 = 4


class Moment(enum.Enum):
    """When a part is there; of the moments after ``always`` only the largest counts, since they take turns."""

    always = "always"
    step = "forward and backward"
    update = "update of the weights"
    evaluation = "evaluation"


@dataclass(frozen=True)
class Part:
    """One line of the estimate. ``is_there``: allocated before training starts, so what is free is without it."""

    what: str
    num_bytes: float
    moment: Moment = Moment.always
    is_on_host: bool = False
    is_there: bool = False


@dataclass(frozen=True)
class Estimate:
    """The parts of one rank; without a GPU (``has_gpu``) all of them are on the host."""

    parts: tuple[Part, ...]
    has_gpu: bool

    def on(self, *, host: bool) -> list[Part]:
        """Return the parts in host memory, or on the GPU."""
        return [part for part in self.parts if (part.is_on_host or not self.has_gpu) is host]

    def peak(self, *, host: bool, with_what_is_there: bool = False) -> float:
        """Return the highest point, of what is still to be allocated or of everything."""
        sums = dict.fromkeys(Moment, 0.0)
        for part in self.on(host=host):
            if with_what_is_there or not part.is_there:
                sums[part.moment] += part.num_bytes
        return sums.pop(Moment.always) + max(sums.values())


@dataclass(frozen=True)
class Subject:
    """What is estimated beside the options: data, towers (which lend their sizes), class names, and where it runs."""

    data: DataSize
    backbone: Backbone
    class_names: tuple[str, ...]
    device: torch.device


def estimate(options: Options, subject: Subject, world_size: int, *, step: StepMemory | None = None) -> Estimate:
    """Return what a rank would hold; ``step`` is counted here unless it is given.

    Raises:
        ConfigError: if the global batch does not divide over the ranks, or DeepSpeed refuses its section.
    """
    if step is None:
        step = step_memory(options, subject.backbone, subject.class_names, world_size=world_size, device=subject.device)
    has_gpu = subject.device.type == "cuda"
    state = estimating.state(subject.data, options, subject.backbone.width, world_size)
    parts = [
        Part("pretrained towers", _towers(subject.backbone), is_there=True),
        *_weights(step, zero_config(options), world_size, has_gpu=has_gpu),
        Part(f"kept for backward: prompts of {len(subject.class_names):,} classes", step.text, Moment.step),
        Part(f"kept for backward: {_micro_batch(options, world_size)}", step.student, Moment.step),
        Part(f"gathered rows of {options.train.global_batch_size:,} samples", step.gathered, Moment.step),
        _highest(step),
        # what the label term takes is part of the step
        *(Part(f"fusion: {need.what}", need.num_bytes) for need in state if "label term" not in need.what),
        *_evaluation(step, subject, world_size),
        _checkpoint(step, state, world_size),
        *(
            Part(f"reading: {need.what}", need.num_bytes, is_on_host=True)
            for need in estimating.reading(subject.data, options, world_size)
            if not options.data.cache_features
        ),
    ]
    if options.data.cache_features:
        parts.append(Part(CACHED, _features(options, subject), is_on_host=True))
    return Estimate(tuple(part for part in parts if part.num_bytes), has_gpu)


def _highest(step: StepMemory) -> Part:
    """Return what is on top of that, where a step holds most: confidence and loss, or backward."""
    if step.fusion > step.backward:
        return Part("fusion: candidates, kernels and loss", step.fusion, Moment.step)
    return Part("backward's own", step.backward, Moment.step)


def _towers(backbone: Backbone) -> int:
    towers = (backbone.image, backbone.text)
    return sum(tensor.nbytes for tower in towers for tensor in (*tower.parameters(), *tower.buffers()))


def _micro_batch(options: Options, world_size: int) -> str:
    train = options.train
    samples = train.global_batch_size // train.accumulation_steps // world_size
    num_views = len(options.method.views)
    return f"{samples:,} samples x {num_views} view{'s' if num_views > 1 else ''}"


def _weights(step: StepMemory, zero: Any, world_size: int, *, has_gpu: bool) -> Iterator[Part]:
    """Yield what DeepSpeed and AdamW keep of the trainable weights, and the teacher."""
    stage, count, width = int(zero.stage), step.num_parameters, step.element_size
    share = count / world_size if stage else count
    is_offloaded = stage > 0 and _is_on_host(zero.offload_optimizer)
    has_weights_on_host = stage == 3 and _is_on_host(zero.offload_param)
    is_narrow = width < _FP32
    of = f" / {world_size} ranks" if stage else ""
    if stage == 3:
        small = [n for layer in step.layers for n in layer if n <= zero.param_persistence_threshold]
        largest = max(sum(layer) for layer in step.layers)
        yield Part(f"trainable weights{of}", width * share, is_on_host=has_weights_on_host)
        yield Part("small weights that ZeRO 3 keeps whole", width * sum(small))
        gathered = min(count, largest + zero.prefetch_bucket_size)
        yield Part("layers that ZeRO 3 has gathered", width * gathered, Moment.step)
    else:
        yield Part("trainable weights", width * count)
    yield Part(f"gradients{' / ' + str(world_size) + ' ranks' if stage else ''}", width * share)
    if stage or is_narrow:
        yield Part(f"fp32 master weights{of}", _FP32 * share, is_on_host=is_offloaded)
    yield Part(f"AdamW's moments{of}", 2 * _FP32 * share, is_on_host=is_offloaded)
    if is_offloaded:
        yield Part(f"offloaded gradients and weights on their way{of}", (_FP32 + width) * share, is_on_host=True)
    bucket = int(zero.reduce_bucket_size)
    if stage and has_gpu:
        buckets = 2 if zero.overlap_comm and stage < 3 else 1
        words = "ZeRO's bucket (deepspeed.zero_optimization.reduce_bucket_size)"
        yield Part(words, width * bucket * buckets, Moment.step)
    elif stage:  # on the CPU memory that is not written to is not taken
        yield Part("ZeRO's bucket", width * min(bucket, count), Moment.step)
    elif world_size > 1:
        yield Part("gradients, flat for their sum over ranks", width * min(bucket, count), Moment.update)
    if is_narrow:
        yield Part("gradients in fp32", _FP32 * share, Moment.update, is_on_host=is_offloaded)
    yield Part("AdamW's step", _FP32 * share, Moment.update, is_on_host=is_offloaded)
    if stage == 3:
        yield Part(f"teacher, fp32{of}", step.teacher / world_size, is_on_host=has_weights_on_host)
    else:
        yield Part("teacher, fp32", step.teacher)


def _is_on_host(offload: Any) -> bool:
    return offload is not None and str(offload.device) != "none"


def _evaluation(step: StepMemory, subject: Subject, world_size: int) -> Iterator[Part]:
    """Yield the scores of a split: this rank's rows, all ranks' rows as they come, and in order."""
    count = subject.data.num_scored
    cells = count * len(subject.class_names)
    yield Part(f"scores of {count:,} images", (2 + 2 / world_size) * (_FP32 + 1) * cells, Moment.evaluation)
    yield Part("a network to evaluate", _FP32 * step.num_parameters, Moment.evaluation)


def _checkpoint(step: StepMemory, state: list[Need], world_size: int) -> Part:
    """Return this rank's share of the training state, copied to be written beside the training."""
    weights = 3 * _FP32 * step.num_parameters + step.teacher
    kept = sum(need.num_bytes for need in state if need.is_saved)
    return Part(
        f"a checkpoint on its way to the disk / {world_size} rank(s)", (weights + kept) / world_size, is_on_host=True
    )


def _features(options: Options, subject: Subject) -> int:
    """Return the bytes of the cached features, which every rank holds: training variants, and all plain ones."""
    data = subject.data
    shape = features.shape(subject.backbone.feature_width, options.data.cached_regions)
    trained = data.num_trained or data.num_samples
    with torch.device("meta"):
        train = features.empty(trained, options.data.cached_variants, shape, len(subject.class_names))
        rest = features.empty(data.num_samples - trained, 0, shape, len(subject.class_names))
    # the training labels are there once more, masked
    columns: list[Tensor] = [
        getattr(made, name) for made in (train, rest) for name in ("random", "plain", "truth", "index")
    ]
    return sum(column.nbytes for column in columns) + train.truth.nbytes


def shown(found: Estimate, room: str = "") -> str:
    """Return the parts as a table, the largest first; ``room`` ends it."""
    text = ""
    for host, title in ((False, "memory of a rank on its GPU"), (True, "memory of a rank on the host")):
        parts = sorted(found.on(host=host), key=lambda part: -part.num_bytes)
        if parts:
            rows = [(size(part.num_bytes), part.what, part.moment.value) for part in parts]
            peak = found.peak(host=host, with_what_is_there=True)
            text += f"{title}\n" + table(("size", "what", "when"), [*rows, (size(peak), "at the highest point", "")])
    return text + room
