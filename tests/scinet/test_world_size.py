"""A global batch is the same on any number of ranks, which take turns in one process; in processes: tests/system."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from scinet import config, objective
from scinet.data.batch import Batch
from scinet.distributed import Ranks
from scinet.fusion.confidence import Fusion
from scinet.fusion.thresholds import DynamicThresholds
from scinet.model.network import Output
from scinet.objective import Objective, Phase, Step

CPU = torch.device("cpu")
G, C, D, R, MEMORY = 12, 5, 8, 4, 30


class _Meeting:
    """What ranks that take turns send to each other: the n-th of each rank belong together."""

    def __init__(self, world_size: int) -> None:
        self.sent: list[list[tuple[Tensor, ...]]] = [[] for _ in range(world_size)]

    def start_gather(self, columns: Sequence[Tensor], ranks: Ranks) -> _Gathering:
        mine = self.sent[ranks.rank]
        mine.append(tuple(columns))
        return _Gathering(self, len(mine) - 1)


class _Gathering:
    def __init__(self, meeting: _Meeting, number: int) -> None:
        self._meeting, self._number = meeting, number

    def rows(self) -> tuple[Tensor, ...]:
        """Row k of rank r is row k R + r of all, as in ``distributed``."""
        parts = [sent[self._number] for sent in self._meeting.sent]
        return tuple(torch.stack(column, dim=1).flatten(0, 1) for column in zip(*parts, strict=True))


class _Samples:
    """Three views' logits and embeddings of a global batch, its labels, and what the teacher says of it."""

    def __init__(self, seed: int, num_valid: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def unit(*shape: int) -> Tensor:
            return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)

        self.valid = torch.arange(G) < num_valid
        self.logits = (3 * torch.randn(3, G, C, generator=generator)).requires_grad_()
        self.embeddings, self.seen = unit(3, G, D), unit(G, D)
        self.regions, self.text = unit(G, R, D), unit(C, D)
        self.teacher = 2 * torch.randn(G, C, generator=generator)
        self.observed = torch.randint(-1, 2, (G, C), generator=generator).to(torch.int8) * self.valid[:, None]
        self.index = torch.where(self.valid, torch.randperm(MEMORY, generator=generator)[:G], -1)

    def share(self, rows: Tensor) -> tuple[Batch, Output, Output]:
        """Return a micro-batch, the student's output on it and the teacher's."""
        observed, valid = self.observed[rows], self.valid[rows]
        ids = tuple(f"{row}" if ok else "" for row, ok in zip(rows.tolist(), valid, strict=True))
        batch = Batch(torch.zeros(3 * len(rows), 1), observed, observed, self.index[rows], ids, valid)
        student = Output(self.logits[:, rows].flatten(0, 1), self.embeddings[:, rows].flatten(0, 1))
        return batch, student, Output(self.teacher[rows], self.seen[rows], self.regions[rows], self.text)


def _aim(ranks: Ranks, *overrides: str) -> Objective:
    words = ["loss.hard_k=3", "loss.threshold_window=20", "fusion.bank_size=16", *overrides]
    options = config.load(None, words)
    text = torch.eye(C)
    fusion = Fusion(
        options.fusion,
        options.correlation,
        text,
        width=D,
        num_regions=R if options.fusion.region_evidence else 0,
        num_samples=MEMORY,
        samples_per_epoch=MEMORY,
    )
    fusion.weights = torch.tensor([0.9, 1.5, 0.4, 2.0, 0.1], dtype=torch.float64)
    return Objective(options, fusion, DynamicThresholds(C, hard_k=3, window=20, device=CPU), ranks)


def _train(
    monkeypatch: pytest.MonkeyPatch, world_size: int, accumulation: int, overrides: Sequence[str]
) -> tuple[list[float], list[Tensor], list[dict[str, Tensor]]]:
    """Return each step's loss summed over ranks, its gradient by logit, and every rank's state after all steps."""
    all_ranks = [Ranks(rank, world_size, CPU) for rank in range(world_size)]
    aims = [_aim(ranks, *overrides) for ranks in all_ranks]
    losses, gradients = [], []
    for number, num_valid in enumerate((G, G, G - 5, G)):
        samples, meeting = _Samples(number, num_valid), _Meeting(world_size)
        monkeypatch.setattr(objective, "start_gather", meeting.start_gather)
        phase = Phase(is_warm=number > 0, epoch=number)
        shares = [
            [samples.share(rows) for rows in torch.arange(ranks.rank, G, world_size).chunk(accumulation)]
            for ranks in all_ranks
        ]
        looks = []
        for aim, share in zip(aims, shares, strict=True):
            told = iter([teacher for _, _, teacher in share])
            micro = [batch for batch, _, _ in share]
            looks.append(aim.look(micro, lambda _, told=told: next(told), _never, has_gaps=num_valid < G))
        steps: list[Step] = []
        for place in range(accumulation):
            for aim, share, look in zip(aims, shares, looks, strict=True):
                batch, student, _ = share[place]
                steps.append(aim(student, batch, phase, num_valid / accumulation, look, place))
        total = torch.stack([step.loss for step in steps]).sum() / accumulation
        (gradient,) = torch.autograd.grad(total, samples.logits)
        losses.append(float(total.detach()))
        gradients.append(gradient)
        for aim, look in zip(aims, looks, strict=True):
            aim.update(look, phase)
            aim.fusion.refresh()
    return losses, gradients, [aim.state_dict() for aim in aims]


def _never(_: Any) -> Output:
    raise AssertionError("SCINet's objective does not look at the student first")


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (3, 1), (4, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("fusion.region_evidence=true", "fusion.region_bank_size=20"),
        ("fusion.weights=fixed",),
        (
            "fusion.weights=fixed",
            "fusion.combine=evidence",
            "fusion.bandwidth=adaptive",
            "fusion.bandwidth_neighbours=3",
        ),
        ("fusion.weights=fixed", "fusion.memory=none", "fusion.momentum=0", "fusion.combine=linear"),
        ("profile=release", "model.bi_dominant=none"),
    ],
    ids=["default", "regions", "fixed", "evidence", "linear", "release"],
)
def test_loss_gradient_and_state_are_those_of_one_rank(
    monkeypatch: pytest.MonkeyPatch, world_size: int, accumulation: int, overrides: tuple[str, ...]
) -> None:
    losses, gradients, (state,) = _train(monkeypatch, 1, 1, overrides)
    its_losses, its_gradients, states = _train(monkeypatch, world_size, accumulation, overrides)
    assert its_losses == pytest.approx(losses, rel=1e-5)
    for mine, theirs in zip(gradients, its_gradients, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-6)
    for other in states:
        assert other.keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)
    assert min(losses) > 0
