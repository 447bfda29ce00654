"""Where a run starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from scinet import config
from scinet.assembling import start_bias
from scinet.data.batch import Batch
from scinet.distributed import Ranks
from scinet.model.network import Output

B, C = 64, 4


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(C))

    def forward(self, inputs: Tensor) -> Output:
        return Output(inputs, inputs)


class _Source:
    def __init__(self, observed: Tensor, truth: Tensor) -> None:
        logits = torch.randn(B, C, generator=torch.Generator().manual_seed(1))
        ids = tuple(map(str, range(B)))
        self._batch = Batch(logits, observed, truth, torch.arange(B), ids, torch.ones(B, dtype=torch.bool))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        yield self._batch


def _mean_at_start(method: str, observed: Tensor, truth: Tensor) -> float:
    network, source = cast(Any, _Network()), cast(Any, _Source(observed, truth))
    start_bias(network, source, config.load(None, [f"method={method}"]), Ranks(0, 1, torch.device("cpu")))
    (batch,) = source.epoch(0)
    return torch.sigmoid(batch.inputs + network.bias).mean().item()


@pytest.mark.parametrize("known", [0.1, 0.7])
def test_bias_starts_at_the_density_of_the_labels_that_the_method_trains_on(known: float) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.where(torch.rand(B, C, generator=generator) < 0.25, 1, -1).to(torch.int8)
    observed = torch.where(torch.rand(B, C, generator=generator) < known, truth, 0).to(torch.int8)
    # of the known cells of this mask, positives are the likelier ones
    observed[(truth < 0) & (torch.rand(B, C, generator=generator) < 0.5)] = 0

    def density(labels: Tensor) -> float:
        return ((labels > 0).sum().item() + 0.5) / ((labels != 0).sum().item() + 1)

    assert density(observed) > density(truth) + 0.05
    assert _mean_at_start("bce", observed, truth) == pytest.approx(density(observed), abs=1e-4)
    assert _mean_at_start("full_labels", observed, truth) == pytest.approx(density(truth), abs=1e-4)
