"""Where a bad number comes from is said, the first place first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from scinet import badnumbers
from scinet.data.batch import Batch
from scinet.model.network import Output
from scinet.objective import Step

NAN = float("nan")


class _Spoils(nn.Module):
    """Passes a tensor on, or what is left of it."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.gradient_factor = 1.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.factor
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * self.gradient_factor)
        return x


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.middle, self.last = _Spoils(), _Spoils()

    def forward(self, inputs: Tensor) -> Output:
        x = self.last(self.second(self.middle(self.first(inputs))))
        return Output(x, x)


def _batch(inputs: Tensor | None = None) -> Batch:
    labels, index = torch.ones(2, 2, dtype=torch.int8), torch.arange(2)
    inputs = torch.randn(2, 2) if inputs is None else inputs
    return Batch(inputs, labels, -labels, index, ("a", "b"), torch.ones(2, dtype=torch.bool))


def _found(network: _Network, batch: Batch, *, loss: float = 1.0, part: float = 1.0) -> str | None:
    def lose(output: Output, place: int) -> Step:
        assert place == 3
        value = output.logits.square().sum()
        return Step(value * loss, {"supervised": value.detach(), "distillation": value.detach() * part}, None, None)

    return badnumbers.find(network, batch, 3, lose)


def test_nothing_is_found_when_all_is_finite() -> None:
    network = _Network()
    assert _found(network, _batch()) is None
    assert not any(module._forward_hooks for module in network.modules())


def test_input_is_named_before_all_that_follows_from_it() -> None:
    assert _found(_Network(), _batch(torch.tensor([[0.0, 1.0], [2.0, NAN]]))) == "in its input"


def test_weight_is_named_before_the_outputs_made_with_it() -> None:
    network = _Network()
    with torch.no_grad():
        network.second.weight[0, 1] = float("inf")
    assert _found(network, _batch()) == "in the weight 'second.weight'"


def test_first_module_is_named_when_an_output_is_bad() -> None:
    network = _Network()
    network.middle.factor = NAN
    assert _found(network, _batch()) == "in the output of 'middle'"
    assert not any(module._forward_hooks for module in network.modules())


def test_part_of_the_loss_is_named_when_the_outputs_are_sound() -> None:
    assert _found(_Network(), _batch(), part=NAN) == "in the loss 'distillation'"
    assert _found(_Network(), _batch(), loss=NAN) == "in the loss 'total'"


@pytest.mark.parametrize(("which", "said"), [("last", "second"), ("middle", "first")])
def test_gradient_is_named_where_it_first_goes_bad(which: str, said: str) -> None:
    network = _Network()
    network.get_submodule(which).gradient_factor = NAN  # type: ignore[assignment]
    found = _found(network, _batch())
    assert found is not None
    assert found.startswith("in the gradient at the output of '")
    assert found.split("'")[1] in (which, said)


def test_batch_is_kept_with_where_it_came_from(tmp_path: Path) -> None:
    batch = _batch()
    path = badnumbers.dump(tmp_path / "bad", batch, step=12, rank=3, place=1, where="in its input")
    assert path == tmp_path / "bad" / "step-12-rank-3-part-1.safetensors"
    with safe_open(str(path), framework="pt") as file:
        described = file.metadata()
        for name in ("inputs", "observed", "truth", "index"):
            assert torch.equal(file.get_tensor(name), getattr(batch, name))
    assert json.loads(described["ids"]) == ["a", "b"]
    assert (described["step"], described["rank"], described["where"]) == ("12", "3", "in its input")


def test_few_samples_are_named_and_the_rest_counted() -> None:
    assert badnumbers.named(("a", "", "b")) == "a, b"
    assert badnumbers.named(tuple("abcde")) == "a, b, c, d, e"
    assert badnumbers.named(tuple("abcdefg")) == "a, b, c, d, e and 2 more"
