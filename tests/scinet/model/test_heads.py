"""Heads: their formulas, written out in float64; what may be permuted; what is refused; what is saved and trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.testing import assert_close

from scinet.engine import parameter_groups
from scinet.errors import ConfigError
from scinet.model import heads
from scinet.model.network import Network, Output
from scinet.model.regions import pooled_to
from scinet.options import BiDominant, Head, ModelOptions, OptimizerOptions
from tests.scinet.model.conftest import FEATURES, WIDTH, WORDS, MakeBackbone

N, R, C = 3, 4, 5
NAMES = ("cat", "dog", "owl", "polar bear", "fox")
OWN = (Head.linear, Head.cam, Head.ml_decoder, Head.dualcoop)
ALL = (Head.prompt_regions, *OWN)
OF_REGIONS = (Head.prompt_regions, *OWN[1:])
Reference = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TABLE = _random(C, WIDTH, WORDS, seed=9)


def _read(context: Tensor) -> Tensor:
    """Stands for the text tower: any smooth function of the context that differs between classes."""
    return torch.tanh(torch.einsum("cdw,mw->cd", TABLE.to(context.dtype), context))


def _head(head: Head, text: Tensor | None = None, **changes: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = heads.build(
            ModelOptions(head=head, **changes), _random(C, WIDTH) if text is None else text, _random(2, WORDS)
        )
        assert made is not None
        for weight in made.parameters():  # nothing is left at its start, where halves of a formula cancel
            nn.init.normal_(weight, std=0.5)
    return made


def _linear(head: Any, image: Tensor, regions: Tensor, text: Tensor) -> Tensor:
    del regions, text
    return torch.stack([torch.stack([row @ weight for weight in head.weight]) for row in image])


def _cam(head: Any, image: Tensor, regions: Tensor, text: Tensor) -> Tensor:
    del image, text
    rows = []
    for row in regions:
        sums = torch.zeros(C, dtype=torch.float64)
        for region in row:
            activation = head.weight @ region
            sums = sums + torch.stack([5 * a if a > 0 else a for a in activation])
        rows.append(sums / R)
    return torch.stack(rows)


def _norm(x: Tensor, layer: Any) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + layer.eps).sqrt() * layer.weight + layer.bias


def _decoder(head: Any, image: Tensor, regions: Tensor, text: Tensor) -> Tensor:
    """Two attention heads; three groups of two classes, the last of which has one."""
    del image
    rows, half = [], WIDTH // 2
    unit = normalize(text, dim=1)
    for row in regions:
        keys = [torch.clamp_min(head.embed.weight @ r + head.embed.bias, 0) for r in row]
        logits = []
        for group in range(3):
            query = _norm(unit[2 * group : 2 * group + 2].mean(0), head.norm_query)
            asked = head.query.weight @ query + head.query.bias
            parts = []
            for piece in (slice(0, half), slice(half, WIDTH)):
                mine = [(head.key.weight @ k + head.key.bias)[piece] for k in keys]
                share = torch.softmax(torch.stack([asked[piece] @ k for k in mine]) / math.sqrt(half), 0)
                values = [(head.value.weight @ k + head.value.bias)[piece] for k in keys]
                parts.append(sum(s * v for s, v in zip(share, values, strict=True)))
            found = _norm(query + head.out.weight @ torch.cat(cast(Any, parts)) + head.out.bias, head.norm_attended)
            hidden = torch.clamp_min(head.inner.weight @ found + head.inner.bias, 0)
            found = _norm(found + head.outer.weight @ hidden + head.outer.bias, head.norm)
            logits += [found @ head.groups[group][:, place] for place in range(2)]
        rows.append(torch.stack(logits[:C]))
    return torch.stack(rows)


def _dualcoop(head: Any, image: Tensor, regions: Tensor, text: Tensor) -> Tensor:
    """From the source's words: a two-way softmax of the aggregated pair, whose log-odds are the logit."""
    del image, text
    positive, negative = (normalize(_read(context), dim=1) for context in (head.positive, head.negative))
    rows = []
    for row in normalize(regions, dim=2):
        logits = []
        for c in range(C):
            plus = torch.stack([20 * (region @ positive[c]) for region in row])
            minus = torch.stack([20 * (region @ negative[c]) for region in row])
            weights = torch.softmax(plus, 0)
            pair = 5 * torch.stack([(weights * minus).sum(), (weights * plus).sum()])
            logits.append(torch.log_softmax(pair, 0)[1] - torch.log_softmax(pair, 0)[0])
        rows.append(torch.stack(logits))
    return torch.stack(rows)


REFERENCES: dict[Head, Reference] = {
    Head.linear: _linear,
    Head.cam: _cam,
    Head.ml_decoder: _decoder,
    Head.dualcoop: _dualcoop,
}
CHANGES: dict[Head, dict[str, Any]] = {
    Head.linear: {},
    Head.cam: {"boost_alpha": 5.0},
    Head.ml_decoder: {"decoder_groups": 3, "attention_heads": 2},
    Head.dualcoop: {},
}


@pytest.mark.parametrize("head", OWN)
def test_value_and_gradient_are_those_of_the_formula(head: Head) -> None:
    made, text = _head(head, **CHANGES[head]), _random(C, WIDTH)
    exact = _head(head, **CHANGES[head]).double()
    inputs = [_random(N, WIDTH, seed=2).requires_grad_(), _random(N, R, WIDTH, seed=3).requires_grad_()]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    got = made(*inputs, _read)
    want = REFERENCES[head](exact, *doubles, text.double())
    assert (got.shape, got.dtype) == ((N, C), torch.float32)
    assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    weights = _random(N, C, seed=4)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    compared = [*zip([*inputs, *made.parameters()], [*doubles, *exact.parameters()], strict=True)]
    assert sum(mine.grad is not None for mine, _ in compared) >= 2
    for mine, theirs in compared:
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None and theirs.grad is not None:
            scale = float(theirs.grad.abs().max())
            assert_close(mine.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4 * max(scale, 1.0))


def test_odds_of_an_image_are_the_mean_of_its_regions_odds(make_backbone: MakeBackbone) -> None:
    network = _network(make_backbone, head=Head.prompt_regions, freeze_image=True, learned_bias=False)
    regions = _random(N, R, FEATURES)
    cached = torch.cat([_random(N, 1, FEATURES, seed=5), regions], dim=1)
    plain = _network(
        make_backbone, head=Head.prompt, bi_dominant=BiDominant.none, freeze_image=True, learned_bias=False
    )
    plain.load_state_dict(network.state_dict())
    of_regions = plain(regions.flatten(0, 1)).logits.view(N, R, C)
    assert_close(network(cached).logits.exp(), of_regions.exp().mean(1), rtol=1e-4, atol=0)
    assert_close(network(cached).embeddings, plain(cached[:, 0]).embeddings)


@pytest.mark.parametrize("head", OWN[1:])
def test_logits_stay_when_regions_are_permuted(head: Head) -> None:
    made, image, regions = _head(head), _random(N, WIDTH), _random(N, R, WIDTH, seed=3)
    assert_close(made(image, regions[:, [2, 0, 3, 1]], _read), made(image, regions, _read), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(made(image, regions[:, [0, 0, 1, 1]], _read), made(image, regions, _read), atol=1e-3)


@pytest.mark.parametrize("head", ALL)
def test_logits_are_permuted_when_classes_are(make_backbone: MakeBackbone, head: Head) -> None:
    order = [3, 0, 4, 1, 2]
    plain, permuted = (
        _network(make_backbone, names, head=head) for names in (NAMES, tuple(NAMES[place] for place in order))
    )
    with torch.no_grad():
        for name, weight in permuted.named_parameters():
            weight.copy_(plain.get_parameter(name))
            if name in ("head.weight", "head.groups", "bias"):
                weight.copy_(weight[order].clone())
    assert_close(permuted(_images()).logits, plain(_images()).logits[:, order], rtol=1e-4, atol=1e-4)


def test_boost_changes_positive_activations_only() -> None:
    plain, boosted = (_head(Head.cam, boost_alpha=alpha) for alpha in (1.0, 5.0))
    image, regions = _random(1, WIDTH), _random(1, 1, WIDTH)
    before, after = plain(image, regions, _read), boosted(image, regions, _read)
    assert (before > 0).any()
    assert (before < 0).any()
    assert_close(after, torch.where(before > 0, 5 * before, before))


def test_classes_share_queries_when_there_are_more_than_groups() -> None:
    made = heads.DecoderHead(_random(205, WIDTH), 100, 2)
    assert made.get_buffer("queries").shape == (69, WIDTH)  # three classes each, as few as 100 groups allow
    assert made(_random(N, WIDTH), _random(N, R, WIDTH), _read).shape == (N, 205)
    assert heads.DecoderHead(_random(C, WIDTH), 100, 2).get_buffer("queries").shape == (C, WIDTH)


def _network(make_backbone: MakeBackbone, names: tuple[str, ...] = NAMES, **changes: Any) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = Network(make_backbone(), names, ModelOptions(**changes), top_k=2).eval()
        for weight in network.parameters():
            nn.init.normal_(weight, std=0.5)
    return network


def _images(size: int = 4) -> Tensor:
    return _random(size, 3, 12, 12)


@pytest.mark.parametrize("head", ALL)
@pytest.mark.parametrize("freeze_image", [True, False])
def test_outputs_have_their_shapes_and_all_of_the_head_trains(
    make_backbone: MakeBackbone, head: Head, *, freeze_image: bool
) -> None:
    network = _network(make_backbone, head=head, freeze_image=freeze_image)
    logits, embeddings, *_ = network(_images())
    assert (logits.shape, logits.dtype, embeddings.shape) == ((4, C), torch.float32, (4, WIDTH))
    assert_close(embeddings.norm(dim=1), torch.ones(4))
    logits.square().sum().backward()
    for name, weight in network.named_parameters():
        if not freeze_image or not name.startswith("image"):
            assert weight.grad is not None, name
            assert name == "head.key.bias" or weight.grad.abs().sum() > 0, name  # a shift of all keys changes nothing


@pytest.mark.parametrize("head", ALL)
def test_outputs_are_fp32_when_weights_are_bf16(make_backbone: MakeBackbone, head: Head) -> None:
    network = _network(make_backbone, head=head)
    exact = network(_images())
    for mine, theirs in zip(network.to(torch.bfloat16)(_images())[:2], exact[:2], strict=True):
        assert mine.dtype == torch.float32
        assert_close(mine, theirs, rtol=0.1, atol=0.1 * float(theirs.detach().abs().max()))


def test_embeddings_are_the_images_whatever_the_head(make_backbone: MakeBackbone) -> None:
    network = _network(make_backbone, head=Head.linear, freeze_image=True)
    for head in OF_REGIONS:
        other = _network(make_backbone, head=head, freeze_image=True)
        other.load_state_dict(network.state_dict(), strict=False)
        assert_close(other(_images()).embeddings, network(_images()).embeddings)


@pytest.mark.parametrize("head", ALL)
def test_clone_and_loaded_state_classify_alike(make_backbone: MakeBackbone, head: Head) -> None:
    network = _network(make_backbone, head=head)
    want: Output = network(_images())
    assert_close(network.clone()(_images()), want)
    with torch.random.fork_rng():
        other = Network(make_backbone(), NAMES, ModelOptions(head=head), top_k=2).eval()
    other.load_state_dict(network.state_dict())
    assert_close(other(_images()), want)


def test_positive_prompt_starts_at_the_words_and_the_negative_one_beside_them(make_backbone: MakeBackbone) -> None:
    network = Network(make_backbone(), NAMES, ModelOptions(head=Head.dualcoop), top_k=2).eval()
    positive, negative = network.texts()
    assert_close(positive, network.class_text)
    apart = (negative - positive).norm(dim=1) / positive.norm(dim=1)
    assert apart.min() > 1e-3
    assert apart.max() < 0.2


@pytest.mark.parametrize("scale", [0.02, 1.0, 50.0])
def test_negative_prompt_starts_a_tenth_of_the_words_own_deviation_away(scale: float) -> None:
    words = scale * _random(40, 30)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = heads.DualPromptHead(words)
    assert torch.equal(made.positive, words)
    assert (made.negative - words).std().item() == pytest.approx(0.1 * words.std().item(), rel=0.1)


@pytest.mark.parametrize("head", OF_REGIONS)
def test_cached_regions_give_what_images_give(
    make_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch, head: Head
) -> None:
    monkeypatch.setattr("scinet.model.network.natively_bf16", lambda _: False)
    network = _network(make_backbone, head=head, freeze_image=True)
    cached, want = network.extract(_images(), side=3), network(_images())
    assert cached.shape == (4, 1 + 9, FEATURES)
    assert_close(cached[:, 0], network.extract(_images()))
    assert_close(network(cached), want, rtol=1e-4, atol=1e-4)
    fewer = network(network.extract(_images(), side=1))
    assert_close(fewer.embeddings, want.embeddings)
    assert torch.allclose(fewer.logits, want.logits, rtol=1e-4, atol=1e-4) == (head is Head.cam)


def test_regions_are_averaged_over_neighbours() -> None:
    image = torch.arange(16.0).view(1, 16, 1)  # a map of 4 x 4
    assert pooled_to(image, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_grid_is_refused_when_the_tower_shows_less(make_backbone: MakeBackbone) -> None:
    network = _network(make_backbone, head=Head.cam, freeze_image=True)
    with pytest.raises(ConfigError, match=r"'data.cached_regions' is 4, expected at most 3: .* 3 x 3 regions"):
        network.extract(_images(), side=4)


@pytest.mark.parametrize("head", OF_REGIONS)
def test_head_is_refused_when_the_tower_shows_no_regions(make_backbone: MakeBackbone, head: Head) -> None:
    with pytest.raises(ConfigError) as caught:
        Network(make_backbone(has_regions=False), NAMES, ModelOptions(head=head), top_k=2)
    assert f"'model.head={head.value}'" in str(caught.value)
    assert "'model.backbone=stub' does not show" in str(caught.value)
    Network(make_backbone(has_regions=False), NAMES, ModelOptions(head=Head.linear), top_k=2)


def test_decoder_is_refused_when_its_heads_do_not_divide_the_width(make_backbone: MakeBackbone) -> None:
    with pytest.raises(ConfigError, match=r"model\.attention_heads is 3"):
        Network(make_backbone(), NAMES, ModelOptions(head=Head.ml_decoder, attention_heads=3), top_k=2)
    Network(make_backbone(), NAMES, ModelOptions(head=Head.cam, attention_heads=3), top_k=2)


def test_names_of_the_prompt_head_stay_those_of_older_checkpoints(make_backbone: MakeBackbone) -> None:
    attention = ("query.weight", "key.weight", "value.weight", "out.weight", "gate")
    expected = {
        *("graph", "bias", "projection.weight", "prompter.fixed", "prompter.context"),
        *(f"label_graph.layers.{number}.weight" for number in range(3)),
        *(f"attend_{side}.{name}" for side in ("text", "image") for name in attention),
    }
    assert set(_network(make_backbone, freeze_image=True).state_dict()) == expected


@pytest.mark.parametrize(("head", "prompts"), [*((head, set()) for head in OWN[:-1]), (Head.dualcoop, {"head"})])
def test_new_weights_have_the_heads_rate_and_prompts_their_own(
    make_backbone: MakeBackbone, head: Head, prompts: set[str]
) -> None:
    network = _network(make_backbone, head=head, freeze_image=True)
    rates = OptimizerOptions(learning_rate=1.0, head_learning_rate=2.0, graph_learning_rate=3.0)
    names = {weight: name.partition(".")[0] for name, weight in network.named_parameters()}
    found: dict[float, set[str]] = {}
    for group in parameter_groups(network, rates):
        found.setdefault(group["lr"], set()).update(names[weight] for weight in group["params"])
    own = {"projection", "bias", "head"} - prompts
    assert found == {2.0: own} | ({1.0: prompts} if prompts else {})


@pytest.mark.parametrize("head", [Head.prompt_regions, Head.cam])
def test_untrained_classifier_is_the_prompts_whatever_the_head(make_backbone: MakeBackbone, head: Head) -> None:
    options = ModelOptions(head=head, freeze_image=True)
    plain = dataclasses.replace(options, head=Head.prompt)
    assert heads.untrained(plain) == plain
    assert heads.untrained(options).bi_dominant is BiDominant.none  # whose attention would ask for a divisor
    with torch.random.fork_rng():
        found, want = (Network(make_backbone(), NAMES, o, top_k=2).eval() for o in (heads.untrained(options), plain))
    assert_close(found(_images()).logits, want(_images()).logits, rtol=1e-4, atol=1e-4)
