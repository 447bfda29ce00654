"""The network on a stub backbone: what trains, what is shared, and what the gates start with."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scinet.errors import ConfigError
from scinet.model.network import Network
from scinet.options import BiDominant, ModelOptions, Prompt
from tests.scinet.model.conftest import FEATURES, WIDTH, MakeBackbone

NAMES = ("cat", "dog", "owl")
OPTIONS = ModelOptions()


def _network(make_backbone: MakeBackbone, *, has_regions: bool = True, **changes: Any) -> Network:
    options = dataclasses.replace(OPTIONS, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Network(make_backbone(has_regions=has_regions), NAMES, options, top_k=2).eval()


def _images(size: int = 4) -> Tensor:
    return torch.randn(size, 3, 12, 8, generator=torch.Generator().manual_seed(0))


def _features(size: int = 4) -> Tensor:
    return torch.randn(size, FEATURES, generator=torch.Generator().manual_seed(0))


def _open_gates(network: Network) -> Network:
    assert network.attend_text is not None
    assert network.attend_image is not None
    nn.init.constant_(network.attend_text.gate, 0.8)
    nn.init.constant_(network.attend_image.gate, 0.6)
    return network


@pytest.mark.parametrize("has_regions", [True, False])
@pytest.mark.parametrize("freeze_image", [True, False])
def test_late_equals_none_when_the_gates_are_zero(
    make_backbone: MakeBackbone, *, has_regions: bool, freeze_image: bool
) -> None:
    late, none = (
        _network(make_backbone, has_regions=has_regions, freeze_image=freeze_image, bi_dominant=bi_dominant)
        for bi_dominant in (BiDominant.late, BiDominant.none)
    )
    for mine, theirs in zip(late(_images()), none(_images()), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    opened = _open_gates(late)(_images())
    assert not torch.allclose(opened.logits, none(_images()).logits, atol=1e-2)


@pytest.mark.parametrize("has_regions", [True, False])
def test_logits_equal_the_formula_when_the_gates_are_open(make_backbone: MakeBackbone, *, has_regions: bool) -> None:
    network = _open_gates(_network(make_backbone, has_regions=has_regions))
    assert network.image is not None
    assert network.bias is not None
    assert network.attend_text is not None
    assert network.attend_image is not None
    assert network.label_graph is not None
    nn.init.normal_(network.bias)
    nn.init.normal_(list(network.label_graph.parameters())[-1])
    unit = nn.functional.normalize
    pooled, regions = network.image.features(_images())
    text = unit(network.label_graph(network.prompter(network.frozen.text), network.get_buffer("graph")), dim=-1)
    logits, embeddings, *_ = network(_images())
    for row in range(4):
        f = unit(network.image.projection(pooled[row]), dim=-1)
        keys = f[None]
        if regions is not None:
            keys = torch.cat([keys, unit(network.image.projection(regions[row]), dim=-1)])
        informed = unit(f + network.attend_text(f[None, None], text[None])[0, 0], dim=-1)
        change = network.attend_image(text[None], keys[None])[0]
        cosine = unit(text + change, dim=-1) @ informed
        torch.testing.assert_close(embeddings[row], informed)
        torch.testing.assert_close(logits[row], 10 * cosine + network.bias, atol=1e-4, rtol=1e-4)


def test_outputs_have_their_shapes_when_classified(make_backbone: MakeBackbone) -> None:
    logits, embeddings, *_ = _network(make_backbone)(_images(5))
    assert (logits.shape, logits.dtype) == ((5, 3), torch.float32)
    assert embeddings.shape == (5, WIDTH)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(5))
    assert logits.abs().max() <= 10 + 1e-4


@pytest.mark.parametrize("bi_dominant", [BiDominant.none, BiDominant.late])
def test_image_is_classified_alike_when_its_company_changes(
    make_backbone: MakeBackbone, bi_dominant: BiDominant
) -> None:
    network = _network(make_backbone, bi_dominant=bi_dominant)
    if bi_dominant is BiDominant.late:
        _open_gates(network)
    whole = network(_images(6)).logits
    torch.testing.assert_close(torch.cat([network(part).logits for part in torch.split(_images(6), 2)]), whole)


def test_features_give_what_images_give_when_the_trunk_has_no_regions(make_backbone: MakeBackbone) -> None:
    network = _network(make_backbone, has_regions=False, freeze_image=True)
    assert network.frozen.trunk is not None
    features = network.frozen.trunk.features(_images())[0]
    torch.testing.assert_close(network(features).logits, network(_images()).logits)
    torch.testing.assert_close(network.extract(_images()), features, atol=0.05, rtol=0.05)  # bf16 where native


@pytest.mark.parametrize(("scale", "expected"), [(10.0, 10.0), (0.0, 20.0)])
def test_scale_is_the_backbones_when_it_is_zero(make_backbone: MakeBackbone, scale: float, expected: float) -> None:
    assert _network(make_backbone, logit_scale=scale).scale == expected


def _trainable(network: Network) -> set[str]:
    return {name.partition(".")[0] for name, weight in network.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"image", "prompter", "label_graph", "attend_text", "attend_image", "bias"}),
        ({"freeze_image": True}, {"projection", "prompter", "label_graph", "attend_text", "attend_image", "bias"}),
        (
            {"freeze_image": True, "bi_dominant": BiDominant.none, "label_graph": False, "learned_bias": False},
            {"projection", "prompter"},
        ),
        (
            {"freeze_image": True, "prompt": Prompt.fixed, "bi_dominant": BiDominant.none},
            {"projection", "label_graph", "bias"},
        ),
    ],
)
def test_only_the_asked_parts_train_when_built(
    make_backbone: MakeBackbone, changes: dict[str, Any], expected: set[str]
) -> None:
    network = _network(make_backbone, **changes)
    assert _trainable(network) == expected
    network(_images()).logits.square().sum().backward()
    assert all(weight.grad is None for weight in network.frozen.text.parameters())
    if network.frozen.trunk is not None:
        assert all(weight.grad is None for weight in network.frozen.trunk.trunk.parameters())


def test_frozen_weights_are_not_saved_when_the_state_is_taken(make_backbone: MakeBackbone) -> None:
    names = _network(make_backbone, freeze_image=True).state_dict()
    assert not [name for name in names if "trunk" in name or "text.table" in name or "frozen" in name]


@pytest.mark.parametrize("freeze_image", [True, False])
def test_clone_shares_frozen_towers_but_no_trained_weight(make_backbone: MakeBackbone, *, freeze_image: bool) -> None:
    network = _open_gates(_network(make_backbone, freeze_image=freeze_image))
    clone = network.clone()
    assert clone.frozen.text is network.frozen.text
    assert clone.frozen.trunk is network.frozen.trunk
    before = network(_images()).logits.detach().clone()
    torch.testing.assert_close(clone(_images()).logits, before)
    assert not {w.data_ptr() for w in clone.parameters()} & {w.data_ptr() for w in network.parameters()}
    with torch.no_grad():
        for weight in clone.parameters():
            weight.add_(1.0)
    torch.testing.assert_close(network(_images()).logits, before)


def test_backbone_keeps_its_weights_when_the_network_trains(make_backbone: MakeBackbone) -> None:
    backbone = make_backbone()
    before = copy.deepcopy(backbone.image.state_dict())
    network = Network(backbone, NAMES, OPTIONS, top_k=2)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in backbone.image.state_dict().items())


def test_batch_norm_stays_in_evaluation_when_the_network_trains(make_backbone: MakeBackbone) -> None:
    network = _network(make_backbone)
    network.train()
    assert network.training
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    before = copy.deepcopy(norms[0].state_dict())
    network(_images())
    assert all(torch.equal(value, before[name]) for name, value in norms[0].state_dict().items())
    assert not network.eval().training


def test_heads_are_refused_when_they_do_not_divide_the_width(make_backbone: MakeBackbone) -> None:
    with pytest.raises(ConfigError) as caught:
        _network(make_backbone, attention_heads=3)
    assert "model.attention_heads is 3, expected a divisor of the embedding width 8 of stub" in str(caught.value)
    _network(make_backbone, attention_heads=3, bi_dominant=BiDominant.none)


def test_network_is_equal_when_its_state_is_loaded(make_backbone: MakeBackbone) -> None:
    first, second = _open_gates(_network(make_backbone)), _network(make_backbone)
    with torch.no_grad():
        for weight in first.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second(_images()).logits, first(_images()).logits)


def test_cached_features_classify_when_the_trunk_is_frozen(make_backbone: MakeBackbone) -> None:
    network = _open_gates(_network(make_backbone, freeze_image=True))
    logits, embeddings, *_ = network(_features(3))
    assert logits.isfinite().all()
    assert embeddings.shape == (3, WIDTH)
