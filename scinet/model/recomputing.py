"""Activation checkpointing: blocks of a tower forget what their backward pass needs and compute it once more."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(tower: nn.Module) -> None:
    """Let each block of a tower keep its input only; results and names of weights stay the same.

    A tower's own switch is not used: several of open_clip's towers take it and do nothing. See :func:`blocks`.
    """
    for block in blocks(tower):
        if "forward" not in vars(block):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost sequences of modules."""
    for child in module.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)) and len(child) > 1:
            yield from child
        else:
            yield from blocks(child)
