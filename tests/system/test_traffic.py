"""The communication plan is held against what ranks really hand to torch.distributed."""

from __future__ import annotations

import inspect
from collections import Counter
from itertools import islice, product
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from scinet import config, estimating, materials, traffic
from scinet.distributed import Ranks
from scinet.memory import Subject
from scinet.telemetry import MetricsLog, Silence
from scinet.trainer import Trainer
from tests import ranks as forked

pytestmark = pytest.mark.multiprocess

# four ranks differ from two in the ring only
KINDS = {2: ("bf16", "accumulated", "zoo"), 4: ("accumulated",)}
EVERY = [(size, stage, kind) for size, kinds in KINDS.items() for stage, kind in product(range(4), kinds)]
SOME = [(2, 0, "zoo"), (2, 1, "bf16"), (2, 2, "accumulated"), (2, 3, "bf16"), (4, 3, "accumulated")]
CASES = [*SOME, *(pytest.param(*case, marks=pytest.mark.nightly) for case in EVERY if case not in SOME)]
COUNTED = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "all_to_all",
    "gather",
    "scatter",
    "send",
    "recv",
    "isend",
    "irecv",
    "batch_isend_irecv",
    "all_gather_object",
    "broadcast_object_list",
    "barrier",
)
OPTIONS = {
    "bf16": ["train.precision=bf16"],
    "accumulated": ["train.precision=fp32", "train.accumulation_steps=2"],
    "zoo": ["train.precision=fp32", "train.accumulation_steps=2", "method=ll_r"],
}
SAME = {
    "all_gather_into_tensor": "all_gather",
    "all_gather_single": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
}
LARGEST_SCALARS = 64
calls: list[tuple[str, int]] = []


def _whole(name: str, arguments: dict[str, Any]) -> int:
    """Return the bytes of what a collective is about: the gathered, the scattered or the reduced tensor."""
    tensors: list[Tensor] = []
    for key in ("tensor_list", "output_tensor", "input_list", "input", "tensor", "output"):
        value = arguments.get(key)
        found = [value] if isinstance(value, Tensor) else value if isinstance(value, list) else []
        if found and isinstance(found[0], Tensor):
            tensors = found
            break
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def watch() -> None:
    """Count every call from now on; before DeepSpeed joins the group, when it keeps the functions that it finds."""
    for name in COUNTED:
        original = getattr(dist, name)
        signature = inspect.signature(original)

        def counted(
            *args: Any, _name: str = name, _original: Any = original, _signature: Any = signature, **kwargs: Any
        ) -> Any:
            calls.append((_name, _whole(_name, _signature.bind(*args, **kwargs).arguments)))
            return _original(*args, **kwargs)

        setattr(dist, name, counted)


def _counted() -> dict[str, int]:
    """Return the bytes of each kind of collective; norms and flags, a few numbers each, apart."""
    found: Counter[str] = Counter()
    for name, size in calls:
        if size > LARGEST_SCALARS:
            found[SAME.get(name, name)] += size
    return dict(found)


def _send(ranks: Ranks, stage: int, kind: str, overrides: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes of a training step that were sent, as one rank, and those planned."""
    options = config.load(None, [*overrides, f"deepspeed.zero_optimization.stage={stage}", *OPTIONS[kind]])
    made = materials.gather(options, ranks, lambda *_: None)
    subject = Subject(estimating.of_card(made.card), made.backbone, made.card.class_names, ranks.device)
    trainer = Trainer(options, made, ranks, MetricsLog(None), Silence())
    trainer.engine.train(True)
    batches = iter(trainer._source.epoch(0))
    for _ in range(3):  # ZeRO 3 learns in the first which weights are wanted when
        micro = list(islice(batches, options.train.accumulation_steps))
        calls.clear()
        trainer.train_step(micro, options.train.global_batch_size)
    sent = _counted()
    planned: Counter[str] = Counter()
    for message in traffic.plan(options, subject, ranks.world_size):
        planned[message.kind.value] += message.num_bytes * message.times
    return sent, dict(planned)


@pytest.mark.parametrize(("size", "stage", "kind"), CASES)
def test_bytes_sent_are_those_planned(on_features: tuple[str, ...], size: int, stage: int, kind: str) -> None:
    # every weight has a use and a gradient
    words = [*on_features, "model.bi_dominant=none", "train.global_batch_size=16"]
    sent, planned = forked.run(_send, stage, kind, words, size=size, before=watch)[0]
    assert sent == planned
