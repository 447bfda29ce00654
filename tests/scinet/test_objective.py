"""How SCINet's loss is put together from its parts."""

from __future__ import annotations

import pytest
import torch

from scinet import config
from scinet.data.batch import Batch
from scinet.distributed import Ranks
from scinet.fusion.confidence import Fusion
from scinet.fusion.thresholds import DynamicThresholds
from scinet.model.network import Output
from scinet.objective import Objective, Phase, Step

CPU = torch.device("cpu")
B, C, D = 12, 5, 8
PARTS = {
    "medium_view_weight": "consistency_weak",
    "strong_view_weight": "consistency_medium",
    "distillation_weight": "distillation",
}


def _step(*overrides: str) -> Step:
    """The loss of a batch of random outputs, on which the student is sure of many classes."""
    generator = torch.Generator().manual_seed(0)
    options = config.load(None, [f"loss.hard_k={C}", *overrides])
    text = torch.eye(C)
    fusion = Fusion(options.fusion, options.correlation, text, width=D, num_samples=B, samples_per_epoch=B)
    thresholds = DynamicThresholds(C, hard_k=C, window=B, device=CPU)
    observed = torch.randint(-1, 2, (B, C), generator=generator).to(torch.int8)
    batch = Batch(
        inputs=torch.zeros(3 * B, 1),
        observed=observed,
        truth=observed,
        index=torch.arange(B),
        ids=tuple(map(str, range(B))),
        valid=torch.ones(B, dtype=torch.bool),
    )
    embeddings = torch.nn.functional.normalize(torch.randn(3 * B, D, generator=generator), dim=1)
    student = Output(4 * torch.randn(3 * B, C, generator=generator), embeddings)
    teacher = Output(torch.randn(B, C, generator=generator), embeddings[:B])
    aim = Objective(options, fusion, thresholds, Ranks(0, 1, CPU))
    look = aim.look([batch], lambda _: teacher, lambda _: student, has_gaps=False)
    return aim(student, batch, Phase(is_warm=True, epoch=3), float(B), look)


def test_loss_is_the_supervised_part_and_the_weighted_rest() -> None:
    step = _step("loss.unlabelled_weight=0.5", "loss.medium_view_weight=2", "loss.strong_view_weight=3")
    parts = step.parts
    rest = 2 * parts["consistency_weak"] + 3 * parts["consistency_medium"] + parts["distillation"]
    assert all(value > 0 for value in parts.values())
    assert step.loss.item() == pytest.approx((parts["supervised"] + 0.5 * rest).item())


@pytest.mark.parametrize(("weight", "part"), PARTS.items())
def test_part_of_a_view_counts_for_nothing_when_its_weight_is_zero(weight: str, part: str) -> None:
    whole, without = _step(), _step(f"loss.{weight}=0")
    assert whole.parts[part] > 0
    assert without.loss.item() == pytest.approx((whole.loss - 0.125 * whole.parts[part]).item())
