"""One rank of the traffic test: what a training step really hands to torch.distributed, beside the plan.

Usage, under torchrun: worker_traffic.py OUT KIND,KIND key=value ...
"""

from __future__ import annotations

import inspect
import json
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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
KINDS = {
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
    """Count every call from now on; before DeepSpeed is imported, which keeps the functions it finds."""
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


def main(out: Path, kinds: list[str], overrides: list[str]) -> None:
    watch()
    from scinet import config, estimating, materials, traffic
    from scinet.distributed import initialise, shut_down
    from scinet.memory import Subject
    from scinet.telemetry import MetricsLog, Silence
    from scinet.trainer import Trainer

    ranks = initialise(120)
    made = materials.gather(config.load(None, overrides), ranks, lambda *_: None)
    subject = Subject(estimating.of_card(made.card), made.backbone, made.card.class_names, ranks.device)
    rows: dict[str, Any] = {}
    for stage in range(4):
        for name in kinds:
            words = [*overrides, f"deepspeed.zero_optimization.stage={stage}", *KINDS[name]]
            options = config.load(None, words)
            trainer = Trainer(options, made, ranks, MetricsLog(None), Silence())
            trainer.engine.train(True)
            batches = iter(trainer._source.epoch(0))
            for _ in range(3):  # ZeRO 3 learns in the first which weights are wanted when
                micro = list(islice(batches, options.train.accumulation_steps))
                calls.clear()
                trainer.train_step(micro, options.train.global_batch_size)
            planned: Counter[str] = Counter()
            for message in traffic.plan(options, subject, ranks.world_size):
                planned[message.kind.value] += message.num_bytes * message.times
            rows[f"{stage}-{name}"] = {"sent": _counted(), "planned": dict(planned), "calls": list(calls)}
    if ranks.is_first:
        (out / "rows.json").write_text(json.dumps(rows))
    shut_down()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
