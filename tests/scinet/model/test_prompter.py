"""Learned context starts as the words it stands for; attention starts as nothing."""

from __future__ import annotations

import pytest
import torch

from scinet.model import backbone
from scinet.model.prompter import CrossAttention, Prompter
from scinet.options import ModelOptions, Prompt
from scinet.paths import cache_directory
from tests.scinet.model.conftest import WIDTH, WORDS, MakeBackbone

NAMES = ("cat", "polar_bear", "a very long name")


def test_learned_context_equals_the_fixed_prompt_when_training_begins(make_backbone: MakeBackbone) -> None:
    text = make_backbone().text
    learned = Prompter(text, NAMES, ModelOptions(prompt=Prompt.learned))
    fixed = Prompter(text, NAMES, ModelOptions(prompt=Prompt.fixed))
    assert learned.context is not None
    assert learned.context.shape == (4, WORDS)
    assert learned(text).shape == (3, WIDTH)
    torch.testing.assert_close(learned(text), fixed(text))


def test_only_the_context_trains_when_learned(make_backbone: MakeBackbone) -> None:
    text = make_backbone().text
    learned = Prompter(text, NAMES, ModelOptions(prompt=Prompt.learned))
    assert [name for name, _ in learned.named_parameters()] == ["context"]
    learned(text).square().sum().backward()
    assert learned.context is not None
    assert learned.context.grad is not None
    assert learned.context.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in text.parameters())


def test_nothing_trains_when_fixed(make_backbone: MakeBackbone) -> None:
    text = make_backbone().text
    fixed = Prompter(text, NAMES, ModelOptions(prompt=Prompt.fixed))
    assert not list(fixed.parameters())
    expected = text(text.tokenize(["a photo of a cat.", "a photo of a polar bear.", "a photo of a a very long name."]))
    torch.testing.assert_close(fixed(text), expected)


@pytest.mark.parametrize("shape", [((1, 5, 8), (3, 4, 8)), ((3, 5, 8), (1, 4, 8)), ((1, 5, 8), (3, 1, 8))])
def test_attention_adds_nothing_when_its_gate_is_zero(shape: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    queries, keys = (torch.randn(size) for size in shape)
    change = CrossAttention(8, 4)(queries, keys)
    assert torch.equal(change, torch.zeros_like(change))
    assert change.dtype == torch.float32


def test_gate_gets_a_gradient_when_it_is_zero() -> None:
    attention = CrossAttention(8, 4)
    attention(torch.randn(1, 5, 8), torch.randn(3, 4, 8)).sum().backward()
    assert attention.gate.grad is not None
    assert attention.gate.grad.abs().sum() > 0


@pytest.mark.parametrize("copies", [2, 5])
def test_one_key_gives_what_identical_keys_give_when_attended_to(copies: int) -> None:
    attention = CrossAttention(8, 4)
    torch.nn.init.ones_(attention.gate)
    queries, key = torch.randn(1, 5, 8), torch.randn(3, 1, 8)
    short, full = attention(queries, key), attention(queries, key.expand(-1, copies, -1))
    assert short.shape == (3, 1, 8)
    assert full.shape == (3, 5, 8)
    torch.testing.assert_close(short.expand_as(full), full)


def test_attention_equals_the_plain_loop_when_queries_are_shared() -> None:
    attention = CrossAttention(8, 4).double()
    torch.nn.init.constant_(attention.gate, 0.7)
    queries, keys = torch.randn(1, 3, 8, dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64)
    got = attention(queries, keys)
    for image in range(2):
        for query in range(3):
            parts = []
            for head in range(4):
                part = slice(2 * head, 2 * head + 2)
                q = (attention.query.weight @ queries[0, query])[part]
                k, v = ((keys[image] @ layer.weight.T)[:, part] for layer in (attention.key, attention.value))
                parts.append(torch.softmax(k @ q / 2**0.5, dim=0) @ v)
            expected = 0.7 * attention.out.weight @ torch.cat(parts)
            torch.testing.assert_close(got[image, query], expected.float())


def test_learned_context_equals_the_fixed_prompt_when_the_towers_are_real() -> None:
    text = backbone.load(ModelOptions(), cache_directory()).text
    learned = Prompter(text, NAMES, ModelOptions(prompt=Prompt.learned))
    fixed = Prompter(text, NAMES, ModelOptions(prompt=Prompt.fixed))
    assert learned.context is not None
    assert len(learned.context) == 4
    torch.testing.assert_close(learned(text), fixed(text), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        learned.context.add_(0.1 * torch.randn_like(learned.context))
    assert not torch.allclose(learned(text), fixed(text), atol=1e-2)
    torch.testing.assert_close(
        fixed(text), text(text.tokenize([f"a photo of a {n.replace('_', ' ')}." for n in NAMES])).float()
    )
