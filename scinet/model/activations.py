"""What a tower keeps for backward of one image or prompt: arithmetic over its modules' sizes, no tensor is made.

Convolutions and linear layers that train keep their input, norms and activations theirs (ReLU its output), attention
its queries, keys, values and output. Modules are taken in the order in which they are registered; a module that is not
known here counts as keeping its output. CLIP's own towers, the embedded ones and ConvNeXt come out within 10 % of a
real pass, those with an attention of their own roughly (``tests/scinet/test_stepmemory.py``).

Shapes: H side of a map or of a grid of patches, T tokens, W width. Sizes are numbers of elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from scinet.model.recomputing import blocks

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
_KEEP_OUTPUT = (nn.ReLU, nn.Sigmoid, nn.Tanh)
_ACTIVATIONS = ("elu", "silu", "swish", "mish")  # in names of classes, whichever library they come from
_BESIDE = ("downsample", "shortcut")  # names of what a block's input passes through beside the modules before


class Pass(NamedTuple):
    """What one image or prompt takes on its way through a tower.

    kept: for backward. recomputed: kept by the block that keeps most above what was kept before it, where blocks keep
    their input only; such a pass keeps ``inputs``. largest: of all outputs. side: H at the end.
    """

    kept: int
    inputs: int
    recomputed: int
    largest: int
    side: int


class _Block(NamedTuple):
    before: int  # kept when it begins
    size: int  # of its input
    kept: int


def of_image(trunk: nn.Module, image_size: int) -> Pass:
    """Return the pass of an image of so many pixels a side through the trunk of an image tower, all of it trained."""
    num_prefixes = getattr(trunk, "num_prefix_tokens", int(hasattr(trunk, "class_embedding")))
    return _Walk(trunk, image_size, num_prefixes, image_size**2, trains=True).whole()


def of_prompt(text: nn.Module, num_tokens: int) -> Pass:
    """Return the pass of a prompt of T tokens through a frozen text tower, with gradients of its first words."""
    return _Walk(text, 0, 0, num_tokens, trains=False).whole()


class _Walk:
    def __init__(self, tower: nn.Module, side: int, num_prefixes: int, positions: int, *, trains: bool) -> None:
        self._side, self._num_prefixes, self._positions, self._trains = side, num_prefixes, positions, trains
        self._width, self._kept, self._largest = 3, 0, 0
        self._follows_attention = False
        self._blocks: list[_Block] = []
        self._ends = {id(block) for block in blocks(tower)}
        self._visit(tower)

    def whole(self) -> Pass:
        inputs = self._kept - sum(block.kept - block.size for block in self._blocks)
        recomputed = forgotten = 0
        for block in self._blocks:
            recomputed = max(recomputed, block.before - forgotten + block.size + block.kept - inputs)
            forgotten += block.kept - block.size
        return Pass(self._kept, inputs, recomputed, self._largest, self._side)

    def _visit(self, module: nn.Module) -> None:
        before, size = self._kept, self._tokens * self._width
        self._pass(module)
        if id(module) in self._ends:
            self._blocks.append(_Block(before, size, self._kept - before))

    @property
    def _tokens(self) -> int:
        return self._positions + self._num_prefixes

    def _keep(self, positions: int, width: int, *, times: int = 1) -> None:
        self._width = width
        self._kept += times * positions * width
        self._largest = max(self._largest, positions * width)

    def _pass(self, module: nn.Module) -> None:
        name = type(module).__name__.lower()
        if isinstance(module, nn.MultiheadAttention):
            self._keep(self._tokens, module.embed_dim, times=4)
            return
        if name == "patchmerging":
            self._shrink(lambda side: side // 2)
        elif isinstance(module, nn.Conv2d):
            kernel, stride = module.kernel_size[0], module.stride[0]
            self._shrink(lambda side: side // stride if kernel == stride else -(-side // stride))
            self._keep(self._positions, module.out_channels)
        elif isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
            stride = module.stride if isinstance(module.stride, int) else module.stride[0]
            self._shrink(lambda side: -(-side // stride))
            # the largest values' places are twice as wide as fp32
            self._keep(self._positions, self._width, times=3 if isinstance(module, nn.MaxPool2d) else 1)
        elif isinstance(module, _BATCH_NORMS):
            self._keep(self._positions, self._width)
        elif isinstance(module, nn.LayerNorm):
            self._keep(self._tokens, module.normalized_shape[0], times=2 if self._trains else 1)
            self._follows_attention = False
        elif isinstance(module, nn.Linear):
            is_added = self._follows_attention or module.out_features < module.in_features
            self._keep(self._tokens, module.out_features, times=0 if is_added else 1)
            self._follows_attention = False
        elif isinstance(module, nn.Embedding):
            self._width = module.embedding_dim
        elif any(word in name for word in _ACTIVATIONS):
            keeps = self._trains and not isinstance(module, _KEEP_OUTPUT)
            # x sigmoid(1.702 x) is formed in steps
            self._keep(self._tokens, self._width, times=int(keeps) + int(name.startswith("quick")))
        elif not any(True for _ in module.children()) and any(True for _ in module.parameters()):
            self._keep(self._tokens, self._width)
        self._pass_children(module)
        if "attention" in name and any(isinstance(child, nn.Linear) for child in module.children()):
            self._keep(self._tokens, self._width)
            self._follows_attention = True

    def _pass_children(self, module: nn.Module) -> None:
        entered = self._side, self._positions, self._width
        for number, (name, child) in enumerate(module.named_children()):
            if number and name in _BESIDE:
                left = self._side, self._positions, self._width
                self._side, self._positions, self._width = entered
                self._visit(child)
                self._side, self._positions, self._width = left
            else:
                self._visit(child)

    def _shrink(self, to: Callable[[int], int]) -> None:
        self._side = to(self._side)
        self._positions = self._side**2
