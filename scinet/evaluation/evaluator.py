"""Scores of a whole split, each sample once at any world size (method.md section 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from scinet.data.batch import Features
from scinet.data.card import DataCard
from scinet.data.stream import Order, SampleStream
from scinet.data.views import Views, decode
from scinet.distributed import Ranks, gather_uneven
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
        gathered = (gather_uneven(torch.cat(rows), ranks, self.num_samples).cpu() for rows in (probabilities, truth))
        return Scores(*gathered)

    def _batches(self, ranks: Ranks) -> Iterator[tuple[Tensor, Tensor]]:
        if self._features is not None:
            mine = slice(ranks.rank, None, ranks.world_size)
            plain, truth = self._features.plain[mine].float(), self._features.truth[mine]
            yield from zip(torch.split(plain, _BATCH), torch.split(truth, _BATCH), strict=True)
            return
        order = Order(0, 0, 1, 0)
        stream = SampleStream(self._card, self._name, order, rank=ranks.rank, world_size=ranks.world_size)
        images: list[Tensor] = []
        labels: list[Tensor] = []
        for sample in stream:
            images.append(self._views.plain(decode(sample.image, sample.where)))
            labels.append(torch.from_numpy(sample.truth))
            if len(images) == _BATCH:
                yield torch.stack(images), torch.stack(labels)
                images, labels = [], []
        if images:
            yield torch.stack(images), torch.stack(labels)
