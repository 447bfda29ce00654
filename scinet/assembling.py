"""What a trainer is put together from: its aim, with the state of SCINet or of a method of the zoo, and its start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from scinet.data.batch import BatchSource
from scinet.distributed import Ranks, gather_rows
from scinet.fusion.bank import GRID
from scinet.fusion.confidence import Fusion
from scinet.fusion.thresholds import DynamicThresholds
from scinet.materials import Materials
from scinet.model.label_graph import propagation, text_correlation
from scinet.model.network import Network
from scinet.objective import Aim, Objective
from scinet.options import Head, Method, Options, Profile, Weights
from scinet.zoo.catalogue import Frame, build
from scinet.zoo.objective import ZooObjective


def build_aim(options: Options, materials: Materials, network: Network, ranks: Ranks) -> Aim:
    """Return the objective of the configured method.

    Args:
        options: the whole configuration.
        materials: data and towers.
        network: the student, with the start of its bias.
        ranks: this process.

    Raises:
        ConfigError: if a table of every sample's labels would exceed its budget.
    """
    if options.method is not Method.scinet:
        return ZooObjective(build(options, _frame(options, materials, network, ranks)), ranks)
    fusion = options.fusion
    if options.profile is Profile.release:
        # its targets come from the label correlation alone: no bank, no memory (method.md section 5)
        fusion = replace(fusion, enabled=False)
    loss = options.loss
    return Objective(
        options,
        Fusion(
            fusion,
            options.correlation,
            text_correlation(network.class_text),
            width=materials.backbone.width,
            num_regions=num_regions(options),
            num_samples=materials.card.num_indices,
            samples_per_epoch=materials.card.split("train").num_samples,
        ),
        DynamicThresholds(
            materials.card.num_classes, hard_k=loss.hard_k, window=loss.threshold_window, device=ranks.device
        ),
        ranks,
    )


def num_regions(options: Options) -> int:
    """Return how many regions of an image the fusion keeps: those of the feature cache, or a grid of means."""
    fusion = options.fusion
    is_used = fusion.enabled and fusion.weights is Weights.fitted and fusion.region_evidence and fusion.region_bank_size
    if not is_used or options.model.head is not Head.prompt_regions:
        return 0
    return min(options.data.cached_regions, GRID) ** 2 if options.data.cache_features else GRID**2


def _frame(options: Options, materials: Materials, network: Network, ranks: Ranks) -> Frame:
    train = materials.card.split("train")
    correlation = options.correlation

    def relation() -> Tensor:
        text = text_correlation(network.class_text)
        return propagation(text, correlation.graph_top_k, correlation.temperature)

    return Frame(
        num_samples=materials.card.num_indices,
        num_classes=materials.card.num_classes,
        num_positives=sum(train.num_positives) / max(1, train.num_samples),
        num_epochs=options.train.epochs,
        device=ranks.device,
        relation=relation,
        cosines=_cosines(options, materials, ranks) if options.method is Method.vlpl else None,
    )


def _cosines(options: Options, materials: Materials, ranks: Ranks) -> Callable[[Tensor], Tensor]:
    """Return the zero-shot classifier, from inputs to cosines [B, C]."""
    network = materials.zero_shot(options).to(ranks.device).eval().requires_grad_(False)

    def cosines(inputs: Tensor) -> Tensor:
        logits: Tensor = network(inputs).logits
        return logits / network.scale

    return cosines


def start_bias(network: Network, source: BatchSource, options: Options, ranks: Ranks) -> None:
    """Start b so that the mean probability on the first batch is the label density (method.md section 2). Collective.

    Args:
        network: whose bias is set, where it has one.
        source: of the training split.
        options: the whole configuration; full labels count where the method trains on them.
        ranks: this process.
    """
    if network.bias is None:
        return
    rows: list[tuple[Tensor, Tensor]] = []
    for batch in (batch.to(ranks.device) for batch in islice(source.epoch(0), options.train.accumulation_steps)):
        with torch.no_grad():
            logits = gather_rows(network(batch.inputs[: len(batch.observed)]).logits, ranks).double()
        valid = gather_rows(batch.valid, ranks)
        labels = batch.truth if options.method is Method.full_labels else batch.observed
        rows.append((logits[valid], gather_rows(labels, ranks)[valid]))
    logits, labels = (torch.cat(column) for column in zip(*rows, strict=True))
    if not len(logits):
        return
    positives, negatives = (labels > 0).sum(), (labels < 0).sum()
    # without a known negative the density among known cells would be 1
    cells = positives + negatives if negatives else torch.tensor(labels.numel())
    density = (positives + 0.5) / (cells + 1.0)
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if torch.sigmoid(logits + middle).mean() > density else (middle, high)
    with torch.no_grad():
        network.bias.fill_(middle)
