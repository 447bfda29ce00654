"""What image towers know of an image's regions, in the space of their pooled features.

Shapes: B images, R regions, F image features, W width inside the tower.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import Tensor, nn

from scinet.errors import ConfigError


def of_map(trunk: nn.Module, grid: Tensor) -> Tensor:
    """Return the regions [B, R, F] of what a timm trunk's ``forward_features`` gives, whichever way it lays it out.

    Args:
        trunk: says which way.
        grid: [B, F, H, W], [B, H, W, F], or tokens of which the first are no regions.
    """
    if grid.ndim == 3:
        return grid[:, getattr(trunk, "num_prefix_tokens", 0) :]
    if getattr(trunk, "output_fmt", "NCHW") == "NHWC":
        return grid.flatten(1, 2)
    return grid.flatten(2).transpose(1, 2)


def reader(visual: nn.Module) -> Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] | None:
    """Return how an open_clip image tower shows regions beside its output, or None where it does not."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, ModifiedResNet):
        return _of_resnet
    if isinstance(visual, VisionTransformer) and visual.attn_pool is None:
        return _of_transformer
    return None


def reads_late(visual: nn.Module) -> bool:
    """Return whether its regions need a weight of the tower's own after it has run, when ZeRO 3 has released that."""
    from open_clip.transformer import VisionTransformer

    return isinstance(visual, VisionTransformer) and visual.proj is not None


def _of_resnet(trunk: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return CLIP's pooled features, and each region as the attention pool would see it alone: its value, projected.

    As in DualCoOp (Sun et al., NeurIPS 2022); its code adds positions, and the mean region as one more.
    """
    pool = cast(Any, trunk).attnpool
    with _kept(cast(Any, trunk).layer4) as grids:
        pooled = trunk(images)
    (grid,) = grids
    return pooled, pool.c_proj(pool.v_proj(grid.flatten(2).transpose(1, 2)))


def _of_transformer(trunk: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return CLIP's pooled features, and its patch tokens as if each were the one that is pooled (ours)."""
    visual = cast(Any, trunk)
    with _kept(visual.transformer) as outputs:
        pooled = trunk(images)
    (tokens,) = outputs
    patches = visual.ln_post(tokens[:, 1:])
    return pooled, patches if visual.proj is None else patches @ visual.proj


@contextlib.contextmanager
def _kept(part: nn.Module) -> Iterator[list[Tensor]]:
    """Keep what a part of a tower returns meanwhile: the tower runs as it is, whatever it does before and after."""
    outputs: list[Tensor] = []
    handle = part.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def pooled_to(regions: Tensor, side: int) -> Tensor:
    """Return the means of regions over a grid of ``side`` x ``side``: [B, side^2, F].

    Args:
        regions: [B, R, F], row by row of a square.
        side: g.

    Raises:
        ConfigError: if the tower shows fewer regions than that.
    """
    own = math.isqrt(regions.shape[1])
    if side > own:
        raise ConfigError(
            f"'data.cached_regions' is {side}, expected at most {own}: the image tower shows {own} x {own} regions at "
            "this 'model.image_size'"
        )
    return resampled(regions, side)


def resampled(regions: Tensor, side: int) -> Tensor:
    """Return regions [B, R, F], row by row of a square, over a grid of ``side`` x ``side``: means, or repeated."""
    own = math.isqrt(regions.shape[1])
    grid = regions.transpose(1, 2).reshape(len(regions), -1, own, own)
    return nn.functional.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2)
