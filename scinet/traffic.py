"""What a training step sends between ranks, and how long it takes on links of stated speed: ``scinet bench plan``.

Sizes come from the code's own objects: the columns of the messages from tensors of their shapes, the weights from a
rehearsed network (:mod:`scinet.rehearsal`). How DeepSpeed moves weights and gradients follows its source;
``tests/system/test_traffic.py`` counts what two and four ranks really send. Evaluations and checkpoints are apart.

Shapes: R ranks, B rows of a rank, G of the global batch, C classes, D embedding, P trainable elements.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from scinet.assembling import num_regions
from scinet.engine import zero_config
from scinet.fusion.bank import blank
from scinet.memory import Subject
from scinet.options import Method, Options
from scinet.rehearsal import Rehearsal, rehearsed
from scinet.zoo.catalogue import sees_everyone

_FP32 = 4
# of a step's image passes: three views forward and, twice as long, backward; the teacher's view is the tenth
_STUDENT_FORWARD, _STUDENT_BACKWARD = 0.3, 0.6
# DeepSpeed fills each group of weights up to a multiple of so many elements a rank
_ALIGNMENT = 2


class Kind(enum.Enum):
    """The collective; its bytes are those of the whole result (all_gather) or of a rank's whole input (the others)."""

    all_gather = "all_gather"
    all_reduce = "all_reduce"
    reduce_scatter = "reduce_scatter"


@dataclass(frozen=True)
class Message:
    """A collective of every step, sent ``times`` over, each time in ``pieces`` that wait for each other.

    behind: the share of the step's computing that a rank does meanwhile.
    """

    what: str
    kind: Kind
    num_bytes: int
    times: int = 1
    pieces: int = 1
    behind: float = 0.0

    def sent(self, world_size: int) -> float:
        """Return the bytes that a rank sends in a step, if messages go round a ring."""
        rounds = 2 if self.kind is Kind.all_reduce else 1
        return rounds * (world_size - 1) / world_size * self.num_bytes * self.times


@dataclass(frozen=True)
class Links:
    """How fast messages go: bytes a second and rank within a host and between hosts, and seconds before they arrive."""

    ranks_per_host: int
    inside: float
    between: float
    latency_s: float

    def seconds(self, message: Message, world_size: int) -> float:
        """Return the time of a message round a ring, whose slowest link counts."""
        if world_size == 1:
            return 0.0
        speed = self.inside if world_size <= self.ranks_per_host else self.between
        rounds = 2 if message.kind is Kind.all_reduce else 1
        hops = rounds * (world_size - 1) * message.times * message.pieces
        return hops * self.latency_s + message.sent(world_size) / speed


def plan(options: Options, subject: Subject, world_size: int) -> list[Message]:
    """Return the messages of a step, scalars (norms, flags) apart.

    Raises:
        ConfigError: if the global batch does not divide over the ranks.
    """
    tried = rehearsed(options, subject, world_size)
    return [*shared(options, len(subject.class_names), subject.backbone.width), *weights(options, tried, world_size)]


def shared(options: Options, num_classes: int, width: int) -> list[Message]:
    """Return what a step's losses share of the global batch.

    Of SCINet these are two messages, what the teacher saw and the confidence it led to; of some methods of the zoo one,
    what the student says.
    """
    rows, steps = options.train.global_batch_size, options.train.accumulation_steps
    with torch.device("meta"):
        seen = blank(rows, num_classes, width, confidence=num_classes, regions=num_regions(options))
        labels = seen.observed
        confidence, positive = torch.empty(rows, num_classes), torch.empty(rows, num_classes, dtype=torch.bool)
        index = torch.empty(rows, dtype=torch.int64)
        everyone = (torch.empty(rows, num_classes), labels, index)
    if options.method is not Method.scinet:
        asked = sum(column.nbytes for column in everyone)
        is_sent = sees_everyone(options.method)
        return [Message("student's logits, labels, indices", Kind.all_gather, asked)] if is_sent else []
    asked = sum(column.nbytes for column in seen)
    # wanted by the first micro-batch's fusion; the last answer has the backward pass after it
    forward, backward = _STUDENT_FORWARD / steps, _STUDENT_BACKWARD / steps
    answered = (confidence.nbytes + positive.nbytes) // steps
    return [
        Message("teacher's embeddings, probabilities, labels, indices", Kind.all_gather, asked, behind=forward),
        Message("confidence and pseudo-positives", Kind.all_gather, answered, times=steps, behind=backward),
    ]


def weights(options: Options, tried: Rehearsal, world_size: int) -> list[Message]:
    """Return how gradients are summed and weights made whole, by ZeRO stage."""
    zero: Any = zero_config(options)
    stage, steps, width = int(zero.stage), options.train.accumulation_steps, tried.element_size
    every = [count for layer in tried.layers for count in layer]
    if stage == 0:
        # DeepSpeed sums zeros for what has no gradient
        return [Message("gradients", Kind.all_reduce, width * sum(every))]
    if stage < 3:
        # stage 1 keeps the sums of a rank until the step, stage 2 only its share: each micro-batch is summed
        gradients = Message("gradients", Kind.all_reduce, width * sum(tried.moved), times=steps if stage == 2 else 1)
        filled = sum(_filled(count, _ALIGNMENT * world_size) for count in tried.groups)
        return [gradients, Message("weights after the update", Kind.all_gather, width * filled)]
    # losses that look at all micro-batches take the student over them once more, in which DeepSpeed loses track
    looks = steps if steps > 1 and sees_everyone(options.method) else 0
    # what is whole for forward stays so for backward, unless there is too much of it
    is_little = sum(every) <= min(zero.max_live_parameters, zero.max_reuse_distance)
    passes = 1 if is_little and not looks else 2
    small = [count for count in every if count <= zero.param_persistence_threshold]
    large = [count for count in every if count > zero.param_persistence_threshold]
    buckets = -(-sum(tried.moved) // zero.reduce_bucket_size)

    def whole(counts: Iterable[int]) -> int:
        return width * sum(_filled(count, world_size) for count in counts)

    messages = [
        Message(
            "weights, layer by layer", Kind.all_gather, whole(large), passes * steps + looks, len(large), behind=1.0
        ),
        Message("gradients", Kind.reduce_scatter, whole(tried.moved), steps, buckets, behind=1.0),
        # small ones are kept whole from one update to the next
        Message("small weights after the update", Kind.all_gather, whole(small)),
    ]
    # partitioned by DeepSpeed too, in fp32 and without such a threshold; no method of the zoo asks it in a step
    if tried.teacher and options.method is Method.scinet:
        size = whole(every) // width * _FP32
        messages.append(Message("teacher, layer by layer", Kind.all_gather, size, steps, len(tried.layers), behind=1.0))
    return messages


def _filled(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def step_seconds(messages: list[Message], compute_s: float, links: Links, world_size: int) -> tuple[float, float]:
    """Return the seconds of a step, and of it those that only messages take.

    What travels behind computing takes nothing as long as it is the shorter; no step is shorter than all its messages.
    """
    alone = [(links.seconds(message, world_size), message.behind * compute_s) for message in messages]
    shown = sum(max(0.0, seconds - hidden) for seconds, hidden in alone)
    taken = max(compute_s + shown, sum(seconds for seconds, _ in alone))
    return taken, taken - compute_s
