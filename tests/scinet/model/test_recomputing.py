"""Activation checkpointing changes what is kept, not what is computed."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from torch import Tensor, nn

from scinet.model.recomputing import recompute_blocks


def _kept_bytes(tower: nn.Module, images: Tensor) -> tuple[int, Tensor, dict[str, Tensor]]:
    """Return the bytes kept for the backward pass, the output, and the gradients."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = tower(images)
    output = output[0] if isinstance(output, tuple) else output
    output.square().sum().backward()
    gradients = {name: value.grad for name, value in tower.named_parameters() if value.grad is not None}
    return sum(kept.values()), output.detach(), gradients


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32"])
def test_gradients_are_equal_and_less_is_kept(name: str) -> None:
    torch.manual_seed(0)
    plain = open_clip.create_model(name, force_image_size=64).visual.eval()
    recomputed = copy.deepcopy(plain)
    recompute_blocks(recomputed)
    recompute_blocks(recomputed)  # a second call changes nothing
    assert recomputed.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(4, 3, 64, 64)
    much, want, want_gradients = _kept_bytes(plain, images)
    little, got, gradients = _kept_bytes(recomputed, images)
    assert torch.equal(got, want)
    assert gradients.keys() == want_gradients.keys()
    for key, value in want_gradients.items():
        torch.testing.assert_close(gradients[key], value, rtol=1e-5, atol=1e-5, msg=key)
    weights = sum(value.nbytes for value in plain.parameters())
    assert little - weights < 0.5 * (much - weights)


def test_a_copy_computes_with_its_own_weights() -> None:
    tower = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    recompute_blocks(tower)
    other = copy.deepcopy(tower)
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    assert not torch.equal(tower(torch.ones(1, 2)), other(torch.ones(1, 2)))
