"""Scores of a whole split, each sample once at any world size (method.md section 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from scinet.data.batch import Features
from scinet.data.card import DataCard
from scinet.data.stream import read_evenly
from scinet.data.views import Views, decode
from scinet.distributed import Ranks, gather_rows
from scinet.model.network import Output

_BATCH = 64


@dataclass(frozen=True)
class Scores:
    """Probabilities [N, C] and truth [N, C] int8 of a split, in the order it was written, equal on every rank."""

    probabilities: Tensor
    truth: Tensor


class PlainSplit:
    """A split as the evaluation sees it: the whole image, no augmentation; from shards or from cached features."""

    def __init__(self, card: DataCard, name: str, views: Views, features: Features | None) -> None:
        """Describe the split; nothing is read yet."""
        self._card, self._name, self._views, self._features = card, name, views, features
        self.num_samples = card.split(name).num_samples

    def score(self, forward: Callable[[Tensor], Output], ranks: Ranks) -> Scores:
        """Run a model over the split. Collective."""
        probabilities, truth = [], []
        for inputs, labels in self._batches(ranks):
            with torch.no_grad():
                probabilities.append(torch.sigmoid(forward(inputs.to(ranks.device)).logits).float())
            truth.append(labels.to(ranks.device))
        gathered = (gather_rows(torch.cat(rows), ranks)[: self.num_samples].cpu() for rows in (probabilities, truth))
        return Scores(*gathered)

    def _batches(self, ranks: Ranks) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield equally many batches on every rank: under ZeRO 3 a forward pass is a collective."""
        if self._features is not None:
            places = torch.arange(ranks.rank, ranks.rank + self.num_samples, ranks.world_size)
            # where the last ranks lack a sample the last one stands in, and is dropped once gathered
            mine = places.clamp_max(self.num_samples - 1)
            plain, truth = self._features.plain[mine].float(), self._features.truth[mine]
            yield from zip(torch.split(plain, _BATCH), torch.split(truth, _BATCH), strict=True)
            return
        samples = read_evenly(self._card, self._name, rank=ranks.rank, world_size=ranks.world_size)
        while batch := list(islice(samples, _BATCH)):
            images = [self._views.plain(decode(sample.image, sample.where)) for sample in batch]
            yield torch.stack(images), torch.stack([torch.from_numpy(sample.truth) for sample in batch])
