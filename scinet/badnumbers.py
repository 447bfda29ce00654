"""A NaN or an infinity in a step: where it came from, in whose batch, and what is kept of it to look at.

The pass is made once more with hooks on every module, so that steps with sound numbers pay nothing for it.
Shapes: B samples of a micro-batch, V views.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scinet.data.batch import Batch
from scinet.layout import WEIGHT, held_parts
from scinet.model.network import Output
from scinet.objective import Step

_MOST_IDS = 5


def find(network: nn.Module, batch: Batch, place: int, lose: Callable[[Output, int], Step]) -> str | None:
    """Return where a micro-batch's first bad number comes from, in words, or None if all are finite. Collective.

    Args:
        network: the student; its weights are those that the step was made with.
        batch: the micro-batch.
        place: of it in its step.
        lose: from the network's output and the place to what the micro-batch gave.
    """
    # without what fills up a rank's share under ZeRO 3, which may be anything
    weight = next((part.name for part in held_parts(network) if not _is_finite(part.read())), None)
    outputs: list[tuple[str, Tensor]] = []
    first: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not first and not _is_finite(tensor):
                    first.append(name)
                if tensor.requires_grad:
                    outputs.append((name, tensor))

        return look

    handles = [module.register_forward_hook(hook(name or "network")) for name, module in network.named_modules()]
    try:
        step = lose(network(batch.inputs), place)
    finally:
        for handle in handles:
            handle.remove()
    # under ZeRO 3 this too is collective, so it comes before the first return
    gradient = _in_gradients(network, step.loss, outputs)
    if not _is_finite(batch.inputs):
        return "in its input"
    if weight:
        return f"in the weight '{weight.removeprefix(f'{WEIGHT}/')}'"
    if first:
        return f"in the output of '{first[0]}'"
    part = next((name for name, value in step.parts.items() if not _is_finite(value)), None)
    if part or not _is_finite(step.loss):
        return f"in the loss '{part or 'total'}'"
    return gradient


def _in_gradients(network: nn.Module, loss: Tensor, outputs: list[tuple[str, Tensor]]) -> str | None:
    """Return the module in whose backward pass the first bad number arises; ZeRO 3 gathers weights on the way."""
    # a partitioned weight is whole on the way only
    weights = [(name, value) for name, value in network.named_parameters() if value.requires_grad and value.numel()]
    found = torch.autograd.grad(loss, [tensor for _, tensor in [*outputs, *weights]], allow_unused=True)
    # the last output to be made is the first to receive its gradient
    for (name, _), gradient in reversed(list(zip(outputs, found[: len(outputs)], strict=True))):
        if gradient is not None and not _is_finite(gradient):
            return f"in the gradient at the output of '{name}'"
    for (name, _), gradient in zip(weights, found[len(outputs) :], strict=True):
        if gradient is not None and not _is_finite(gradient):
            return f"in the gradient of the weight '{name}'"
    return None


def dump(folder: Path, batch: Batch, *, step: int, rank: int, place: int, where: str) -> Path:
    """Keep a micro-batch as safetensors, its sample ids and the finding in the header."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step}-rank-{rank}-part-{place}.safetensors"
    tensors = {name: getattr(batch, name).cpu().contiguous() for name in ("inputs", "observed", "truth", "index")}
    metadata = {"ids": json.dumps(list(batch.ids)), "step": str(step), "rank": str(rank), "where": where}
    save_file(tensors, str(path), metadata=metadata)
    return path


def named(ids: tuple[str, ...]) -> str:
    """Return the first few sample ids of a batch in words."""
    present = [name for name in ids if name]
    more = len(present) - _MOST_IDS
    return ", ".join(present[:_MOST_IDS]) + (f" and {more} more" if more > 0 else "")


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.detach().isfinite().all())
