"""The tables of ``scinet bench plan``: bytes a rank sends in a step, and the step's time by the model of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from scinet import config
from scinet.data import sources
from scinet.estimating import DataSize
from scinet.memory import Subject
from scinet.model import backbone as model_backbone
from scinet.options import Options
from scinet.paths import cache_directory
from scinet.rehearsal import rehearsed
from scinet.texttable import size
from scinet.traffic import Links, Message, shared, step_seconds, weights

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Scenario:
    """G and R to be planned for, and B, the largest micro-batch of a rank; ``flop_per_s``: what a rank achieves."""

    batches: Sequence[int]
    ranks: Sequence[int]
    micro_batch: int
    flop_per_s: float
    links: Links


@dataclass(frozen=True)
class Row:
    """One G and R: accumulation steps, messages that losses share, those of weights by ZeRO stage, and computing."""

    rows: int
    ranks: int
    steps: int
    shared: list[Message]
    weights: dict[int, list[Message]]
    compute_s: float


def subject(options: Options, num_classes: int | None, device: str) -> Subject:
    """Return what is planned for: the shapes of the towers, and as many classes as asked for or as the data have.

    Raises:
        ConfigError: if the shapes cannot be had, or the data are not built and ``num_classes`` is not given.
    """
    backbone = model_backbone.skeleton(options.model, cache_directory(options.data.cache_dir))
    count = num_classes or sources.read_card(options.data).num_classes
    names = tuple(f"class name {number:05d}" for number in range(count))
    # the messages do not depend on the number of images
    data = DataSize(1, count, 0, 0, 1, 1)
    return Subject(data, backbone, names, torch.device(device))


def rows(options: Options, subject: Subject, scenario: Scenario) -> Iterator[Row]:
    """Yield a row for every G and R that divide.

    Raises:
        ConfigError: if DeepSpeed refuses its section.
    """
    for batch in scenario.batches:
        for ranks in scenario.ranks:
            share, rest = divmod(batch, ranks)
            if rest or not share:
                continue
            fewest = -(-share // scenario.micro_batch)
            steps = next(count for count in range(fewest, share + 1) if share % count == 0)
            own = config.replace(options, train__global_batch_size=batch, train__accumulation_steps=steps)
            tried = rehearsed(own, subject, ranks)
            staged = {
                stage: weights(config.replace(own, deepspeed={"zero_optimization": {"stage": stage}}), tried, ranks)
                for stage in STAGES
            }
            sent = shared(own, len(subject.class_names), subject.backbone.width)
            yield Row(batch, ranks, steps, sent, staged, tried.flop * steps / scenario.flop_per_s)


def report(options: Options, subject: Subject, scenario: Scenario) -> str:
    """Return both tables as Markdown, with what they assume."""
    found = list(rows(options, subject, scenario))
    links = scenario.links
    title = (
        f"{subject.backbone.name} ({subject.backbone.width} wide), {len(subject.class_names):,} classes; micro-batches "
        f"of at most {scenario.micro_batch} samples a rank.\n\n"
    )
    speeds = (
        f"\nA step by the model: {scenario.flop_per_s / 1e12:g} TFLOP/s achieved a rank; {links.inside / 1e9:g} GB/s "
        f"a rank within a host of {links.ranks_per_host}, {links.between / 1e9:g} GB/s between hosts, "
        f"{links.latency_s * 1e6:g} us a hop of the ring.\nIn brackets the part that no computing hides.\n\n"
    )
    return title + _bytes(found) + speeds + _times(found, scenario)


def _header(*names: str) -> str:
    return f"| {' | '.join(names)} |\n|{' --- |' * len(names)}\n"


def _stages() -> list[str]:
    return [f"ZeRO {stage}" for stage in STAGES]


def _bytes(found: Sequence[Row]) -> str:
    lines = [_header("G", "ranks", "micro-batches", "losses", *_stages())]
    for row in found:
        total = [size(sum(message.sent(row.ranks) for message in sent)) for sent in (row.shared, *row.weights.values())]
        lines.append(f"| {row.rows:,} | {row.ranks} | {row.steps} | {' | '.join(total)} |\n")
    return "".join(lines)


def _times(found: Sequence[Row], scenario: Scenario) -> str:
    lines = [_header("G", "ranks", "computing", *_stages())]
    for row in found:
        shown = []
        for sent in row.weights.values():
            taken, exposed = step_seconds([*row.shared, *sent], row.compute_s, scenario.links, row.ranks)
            shown.append(f"{taken:.3f} s ({exposed / taken:.1%})")
        lines.append(f"| {row.rows:,} | {row.ranks} | {row.compute_s:.3f} s | {' | '.join(shown)} |\n")
    return "".join(lines)
