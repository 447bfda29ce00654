"""What DeepSpeed and AdamW are told, and what a step does with a loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from scinet import config
from scinet.data.batch import Batch
from scinet.distributed import Ranks, initialise
from scinet.engine import deepspeed_config, parameter_groups, uses_bf16
from scinet.layout import Part
from scinet.model.network import Network
from scinet.objective import Step
from scinet.trainer import Trainer
from tests.scinet.model.conftest import small_backbone
from tests.scinet.small_runs import begin, changed, taken, train_to

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    return initialise(60)


def _groups(*overrides: str) -> dict[str, tuple[float, float]]:
    """Return learning rate and weight decay by the name of each trainable parameter."""
    options = config.load(
        None,
        [
            "optimizer.learning_rate=1",
            "optimizer.graph_learning_rate=2",
            "optimizer.head_learning_rate=3",
            "optimizer.weight_decay=0.5",
            *overrides,
        ],
    )
    network = Network(small_backbone(), ("cat", "dog"), options.model, top_k=2)
    names = {parameter: name for name, parameter in network.named_parameters()}
    found = {}
    for group in parameter_groups(network, options.optimizer):
        for parameter in group["params"]:
            assert names[parameter] not in found, "each parameter is in one group"
            found[names[parameter]] = (group["lr"], group["weight_decay"])
    assert found.keys() == {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    return found


def test_rate_is_that_of_the_part_and_vectors_do_not_decay() -> None:
    found = _groups("model.freeze_image=true")
    assert found["projection.weight"] == (3, 0.5)
    assert found["bias"] == (3, 0)
    assert found["label_graph.layers.0.weight"] == (2, 0.5)
    assert found["prompter.context"] == (1, 0.5)
    assert found["attend_text.query.weight"] == found["attend_image.out.weight"] == (1, 0.5)
    assert found["attend_text.gate"] == (1, 0)
    trained = _groups()
    assert trained["image.trunk.conv.weight"] == (1, 0.5)
    assert trained["image.trunk.norm.bias"] == trained["image.trunk.conv.bias"] == (1, 0)


@pytest.mark.parametrize(("head", "rate"), [("linear", 3), ("cam", 3), ("dualcoop", 1)])
def test_rate_of_a_head_is_its_own_unless_it_learns_prompts(head: str, rate: float) -> None:
    found = _groups(f"model.head={head}")
    own = {name: group[0] for name, group in found.items() if name.startswith("head.")}
    assert own
    assert set(own.values()) == {rate}


@pytest.mark.parametrize(
    ("precision", "on_cpu", "on_gpu"), [("auto", False, True), ("fp32", False, False), ("bf16", True, True)]
)
def test_towers_compute_in_bf16_where_asked_or_on_a_gpu(precision: str, on_cpu: bool, on_gpu: bool) -> None:
    options = config.load(None, [f"train.precision={precision}"])
    assert (uses_bf16(options, CPU), uses_bf16(options, GPU)) == (on_cpu, on_gpu)
    assert deepspeed_config(options, 1, GPU)["bf16"] == {"enabled": on_gpu}


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (4, 1), (2, 3)])
def test_batch_of_a_rank_is_its_part_of_the_global_one(ranks: int, accumulation: int) -> None:
    words = ["train.global_batch_size=48", f"train.accumulation_steps={accumulation}", "optimizer.gradient_clip=0.7"]
    found = deepspeed_config(config.load(None, words), ranks, CPU)
    assert found["train_batch_size"] == 48
    assert found["gradient_accumulation_steps"] == accumulation
    assert found["train_micro_batch_size_per_gpu"] * ranks * accumulation == 48
    assert found["gradient_clipping"] == 0.7


def test_deepspeed_section_wins_over_what_is_derived() -> None:
    words = ["deepspeed.steps_per_print=5", "deepspeed.zero_optimization.stage=2"]
    found = deepspeed_config(config.load(None, words), 1, CPU)
    assert found["steps_per_print"] == 5
    assert found["zero_optimization"] == {"stage": 2}


class _Scaled(Trainer):
    """A trainer whose loss is the aim's, times a number, plus one that has no gradient."""

    factor, added = 1.0, 0.0

    def train_step(self, micro: list[Batch], num_valid: int) -> list[Step]:
        plain = self._aim

        def scaled(*arguments: Any) -> Step:
            step = plain(*arguments)
            return dataclasses.replace(step, loss=step.loss * self.factor + self.added)

        self._aim = _Calls(plain, scaled)  # type: ignore[assignment]
        try:
            return super().train_step(micro, num_valid)
        finally:
            self._aim = plain


class _Calls:
    """An aim that is called in another way."""

    def __init__(self, aim: Any, call: Any) -> None:
        self._aim, self._call = aim, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._aim, name)

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)


def _one_step(ranks: Ranks, *overrides: str, factor: float = 1.0, added: float = 0.0) -> Any:
    trainer, _ = begin(ranks, "method=bce", *overrides, kind=_Scaled)
    assert isinstance(trainer, _Scaled)
    trainer.factor, trainer.added = factor, added
    train_to(trainer, 1)
    return trainer


def test_gradient_norm_is_that_before_clipping_and_the_step_that_after(ranks: Ranks) -> None:
    moments = {}
    for clip in ("0", "0.001"):
        trainer = _one_step(ranks, f"optimizer.gradient_clip={clip}")
        tensors, _ = taken(trainer.state())
        first = torch.cat([v.reshape(-1) for name, v in tensors.items() if "/exp_avg/" in name])
        moments[clip] = first.norm().item() / 0.1  # AdamW's first moment is a tenth of the gradient
        norm = trainer.engine.gradient_norm()
        assert norm > 0.01
    assert moments["0"] == pytest.approx(norm, rel=1e-4)
    assert moments["0.001"] == pytest.approx(0.001, rel=1e-3)


def test_gradient_is_that_of_the_sum_over_ranks(ranks: Ranks) -> None:
    # DeepSpeed takes the mean over ranks; alone, as if there were three, the gradient is three times as large
    alone = _one_step(ranks, "optimizer.gradient_clip=0")
    trainer, _ = begin(ranks, "method=bce", "optimizer.gradient_clip=0")
    trainer.engine._world_size = 3
    train_to(trainer, 1)
    assert trainer.engine.gradient_norm() == pytest.approx(3 * alone.engine.gradient_norm(), rel=1e-4)


def test_step_is_left_out_when_the_loss_alone_is_not_finite(ranks: Ranks, tmp_path: Any) -> None:
    words = (f"output={tmp_path}", "train.on_bad_numbers=skip")
    before, _ = taken(begin(ranks, "method=bce", *words)[0].state())
    trainer = _one_step(ranks, *words, added=float("inf"))
    assert changed(before, taken(trainer.state())[0]) == []
    assert trainer.progress.bad_steps == 1


def test_parts_name_weight_and_both_moments_of_every_trainable_parameter(ranks: Ranks) -> None:
    trainer, _ = begin(ranks, "method=bce")
    train_to(trainer, 2)
    parts = {part.name: part for part in trainer.engine.layout.parts()}
    trained = {n: p for n, p in trainer.engine.network.named_parameters() if p.requires_grad}
    assert parts.keys() == {f"{what}/{name}" for what in ("weight", "exp_avg", "exp_avg_sq") for name in trained}
    for name, parameter in trained.items():
        part: Part = parts[f"weight/{name}"]
        assert (part.shape, part.start, part.numel) == (tuple(parameter.shape), 0, parameter.numel())
        assert torch.equal(part.read(), parameter.data.reshape(-1))
        assert (parts[f"exp_avg_sq/{name}"].read() >= 0).all()
    assert any((part.read() < 0).any() for name, part in parts.items() if name.startswith("exp_avg/"))
