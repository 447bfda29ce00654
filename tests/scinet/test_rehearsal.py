"""What is rehearsed without memory is what the real step holds."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from scinet import config
from scinet.model import backbone as model_backbone
from scinet.model.backbone import Backbone
from scinet.model.network import Network
from scinet.options import Method, Options
from scinet.paths import cache_directory
from scinet.rehearsal import LiveBytes, Rehearsal, rehearse
from tests.scinet.kept_bytes import kept_by

NAMES = ("cat", "dog", "owl", "barn owl")
FINE_TUNED = ("model.backbone=debug", "model.image_size=64", "train.global_batch_size=4")
CACHED = ("model.freeze_image=true", "data.cache_features=true")


def _options(*overrides: str) -> Options:
    return config.load(None, [*FINE_TUNED, *overrides])


@cache
def _towers(freezes: bool = False) -> Backbone:
    return model_backbone.load(_options(f"model.freeze_image={freezes}").model, cache_directory(""))


def _rehearse(*overrides: str, world_size: int = 1, device: str = "cpu") -> Rehearsal:
    options = _options(*overrides)
    towers = _towers(options.model.freeze_image)  # a network that freezes a trunk does so for all who share it
    return rehearse(options, towers, NAMES, world_size=world_size, device=torch.device(device))


@pytest.mark.parametrize("freezes", [pytest.param("true", marks=pytest.mark.nightly), "false"])
def test_kept_bytes_are_those_of_a_real_pass(freezes: str) -> None:
    options = _options(f"model.freeze_image={freezes}")
    network = Network(_towers(options.model.freeze_image), NAMES, options.model, top_k=20).train()
    text = network.frozen.text
    tensors = [*network.parameters(), *network.buffers(), *text.parameters(), *text.buffers()]
    inputs = torch.randn(12, 3, 64, 64)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*tensors, inputs]}
    found = _rehearse(f"model.freeze_image={freezes}")
    assert found.text + found.student == pytest.approx(kept_by(lambda: network(inputs), own), rel=0.1)


@pytest.mark.nightly
def test_kept_bytes_are_those_of_a_real_pass_when_blocks_recompute() -> None:
    options = _options("model.activation_checkpointing=true")
    towers = copy.deepcopy(_towers())  # a network that recomputes lets its text tower do so for all who share it
    network = Network(towers, NAMES, options.model, top_k=20).train()
    inputs = torch.randn(12, 3, 64, 64)
    with LiveBytes() as live:
        network(inputs)  # from now on it knows the weights
        kept = live.kept_by(lambda: network(inputs))
    found, plain = _rehearse("model.activation_checkpointing=true"), _rehearse()
    assert found.text + found.student == pytest.approx(kept, abs=2**20)
    assert found.student < 0.5 * plain.student
    # a stage is recomputed at a time
    assert plain.backward < found.backward < 0.5 * plain.student
    assert plain.flop < found.flop < 1.4 * plain.flop


def test_images_count_in_proportion_and_prompts_do_not() -> None:
    few, many = (_rehearse(*CACHED, f"train.global_batch_size={size}") for size in (64, 128))
    assert many.text == few.text > 0
    assert many.student == pytest.approx(2 * few.student, rel=0.05)


def test_ranks_and_accumulation_divide_the_images() -> None:
    words = (*CACHED, "train.global_batch_size=128")
    whole, shared = _rehearse(*words), _rehearse(*words, world_size=2)
    taken = _rehearse(*words, "train.accumulation_steps=2")
    assert shared.student == taken.student == pytest.approx(whole.student / 2, rel=0.05)
    # every rank fuses with the rows of all
    assert shared.gathered == taken.gathered >= whole.gathered > 0


def test_trainable_elements_are_the_networks() -> None:
    network = Network(_towers(), NAMES, _options().model, top_k=20)
    found = _rehearse()
    assert found.num_parameters == sum(p.numel() for p in network.parameters())
    assert found.element_size == 4
    assert _rehearse(*CACHED, "train.precision=bf16").element_size == 2
    assert _rehearse(*CACHED, device="cuda").element_size == 2


def test_teacher_is_the_trainable_weights_in_fp32() -> None:
    for precision in ("fp32", "bf16"):
        found = _rehearse(*CACHED, f"train.precision={precision}")
        assert found.teacher == pytest.approx(4 * found.num_parameters, rel=0.02)
    assert _rehearse(*CACHED, "method=bce").teacher > 0  # its average is what is evaluated


def test_confidence_needs_more_when_the_bank_is_larger() -> None:
    small, large = (_rehearse(*CACHED, f"fusion.bank_size={size}").fusion for size in (1024, 16384))
    # candidates: embeddings, ids, labels, and two columns a class that are propagated
    assert large - small > 15360 * (4 * _towers().width + 8)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "overrides",
    [
        ("profile=release", "model.bi_dominant=none"),
        ("fusion.weights=fixed", "fusion.combine=linear"),
        ("fusion.differentiable=true",),
        ("fusion.enabled=false",),
        ("model.freeze_image=true", "data.cache_features=true"),
    ],
)
def test_every_kind_of_step_is_rehearsed(overrides: tuple[str, ...]) -> None:
    found = _rehearse(*overrides)
    assert found.student > 0
    assert found.fusion > 0


def test_rehearsing_changes_neither_towers_nor_random_numbers() -> None:
    tensors: dict[str, Any] = {name: value.clone() for name, value in _towers().image.state_dict().items()}
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    _rehearse()
    assert torch.equal(torch.rand(3), wanted)
    assert all(torch.equal(value, tensors[name]) for name, value in _towers().image.state_dict().items())


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["RN101", "ViT-B-16"])
def test_towers_without_weights_are_rehearsed_as_those_with(name: str, tmp_path: Path) -> None:
    options = _options(f"model.backbone={name}", "model.pretrained=openai", "model.image_size=224")
    towers = model_backbone.skeleton(options.model, tmp_path)
    assert {tensor.device.type for tensor in towers.image.parameters()} == {"meta"}
    found = rehearse(options, towers, NAMES, world_size=1, device=torch.device("cpu"))
    assert found.num_parameters > 50_000_000
    assert found.student > 500 * 2**20


@pytest.mark.nightly
@pytest.mark.parametrize("method", [method.value for method in Method if method is not Method.zero_shot])
def test_step_of_every_method_is_rehearsed(method: str) -> None:
    own = ("model.head=dualcoop", "data.cached_regions=2") if method == "dualcoop" else ()
    found = _rehearse(f"method={method}", *CACHED, *own)
    assert found.student > 0
    assert found.teacher > 0
    assert len(found.moved) >= (4 if own else 10)  # projection, two contexts, bias


def test_global_batch_is_gathered_only_where_a_method_looks_at_it() -> None:
    sizes = {
        method: _rehearse(f"method={method}", "train.global_batch_size=64", *CACHED, world_size=16).gathered
        for method in ("bce", "asl", "ll_r", "scinet")
    }
    assert sizes["bce"] == sizes["asl"] == 0
    assert min(sizes["ll_r"], sizes["scinet"]) >= 64 * len(NAMES) * 4  # a float for each of the batch's labels


@pytest.mark.nightly
@pytest.mark.parametrize("head", ["prompt_regions", "linear", "cam", "ml_decoder", "dualcoop"])
@pytest.mark.parametrize("overrides", [(), (*CACHED, "data.cached_regions=2")])
def test_step_of_every_head_is_rehearsed(head: str, overrides: tuple[str, ...]) -> None:
    options = _options(f"model.head={head}", *overrides)
    network = Network(_towers(options.model.freeze_image), NAMES, options.model, top_k=20)
    for method in ("scinet", "vlpl"):
        found = _rehearse(f"method={method}", f"model.head={head}", *overrides)
        assert found.num_parameters == sum(p.numel() for p in network.parameters() if p.requires_grad)
        assert (found.text > 0) == (head in ("prompt_regions", "dualcoop"))
        assert found.student > 0


def test_regions_of_images_are_kept_for_backward() -> None:
    small, large = (_rehearse("model.head=ml_decoder", *CACHED, f"data.cached_regions={side}") for side in (2, 6))
    # at least keys and values of 32 more regions in three views of four samples
    assert large.student - small.student > 2 * 4 * _towers().width * 32 * 3 * 4


def test_untrained_network_of_vlpl_is_counted() -> None:
    plain, found = _rehearse("method=bce", *CACHED), _rehearse("method=vlpl", *CACHED)
    assert found.teacher == 2 * plain.teacher
