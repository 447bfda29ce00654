"""``scinet bench ranks``: the steps of as many ranks as were started, beside what the communication plan says of them.

The plan is given what can be measured without a step: the encoder's passes on all ranks at once, and the links.
Contestants take turns, and a step ends when the slowest rank has.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from scinet import config, contestants, estimating, materials, pairing
from scinet.distributed import Ranks, gather_objects, initialise, shut_down, sum_over_ranks, wait_for_all
from scinet.materials import Materials
from scinet.memory import Subject
from scinet.options import Options
from scinet.rehearsal import rehearsed
from scinet.traffic import Kind, Links, Message, plan, step_seconds
from scinet.traffic_report import STAGES

_TRIES = 5


def report(options: Options, repeats: int, say: Callable[[str], None]) -> str:
    """Return the encoder's time, the links, and a step by ZeRO stage, measured and planned: a row. Collective.

    Args:
        options: of the run; the image tower trains on random images.
        repeats: turns.
        say: told what is being measured.

    Raises:
        ConfigError: if the configuration does not train SCINet, or data or weights cannot be had.
    """
    tuned = contestants.tuned(options)
    ranks = initialise(options.train.collective_timeout_s)
    try:
        made = materials.gather(tuned, ranks, lambda *_: None)
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        title = (
            f"{made.backbone.name} towers, the image tower trained, G = {tuned.train.global_batch_size}, "
            f"{tuned.model.image_size} px, {made.card.num_classes} classes, one machine, {ranks.device.type}, "
            f"{backend}, threads a rank: {torch.get_num_threads()}; medians of {repeats} turns.\n\n"
        )
        return title + _row(tuned, made, ranks, repeats, say if ranks.is_first else lambda _: None)
    finally:
        shut_down()


def _row(options: Options, made: Materials, ranks: Ranks, repeats: int, say: Callable[[str], None]) -> str:
    staged = [config.replace(options, deepspeed={"zero_optimization": {"stage": stage}}) for stage in STAGES]
    competing = [
        contestants.encoder(options, made, ranks),
        *(contestants.scinet(own, made, ranks) for own in staged),
    ]
    steps = [contestant.step for contestant in competing]
    turns = pairing.take_turns(steps, repeats, lambda: _settle(ranks), say)
    computing_s, *measured = map(statistics.median, turns)
    subject = Subject(estimating.of_card(made.card), made.backbone, made.card.class_names, ranks.device)
    links = _links(rehearsed(options, subject, ranks.world_size).num_parameters, ranks)
    planned = [
        step_seconds(plan(own, subject, ranks.world_size), computing_s, links, ranks.world_size)[0] for own in staged
    ]
    speed = f"{links.inside / 1e9:.2f} GB/s, {1e6 * links.latency_s:.0f} us" if ranks.world_size > 1 else "-"
    cells = [f"{real:.2f} s ({model:.2f} s)" for real, model in zip(measured, planned, strict=True)]
    names = ["ranks", "encoder's passes", "links", *(f"ZeRO {stage} (planned)" for stage in STAGES)]
    values = [str(ranks.world_size), f"{computing_s:.2f} s", speed, *cells]
    return f"| {' | '.join(names)} |\n|{' --- |' * len(names)}\n| {' | '.join(values)} |\n"


def _settle(ranks: Ranks) -> None:
    pairing.synchronise(ranks.device)
    wait_for_all(ranks)


def _links(num_elements: int, ranks: Ranks) -> Links:
    """Return what the links did when as many fp32 numbers as the network has weights were summed, and when one was."""
    if ranks.world_size == 1:
        return Links(1, 1.0, 1.0, 0.0)

    def seconds(count: int) -> float:
        values = torch.zeros(count, device=ranks.device)
        tries = []
        for _ in range(_TRIES):
            _settle(ranks)
            started = time.perf_counter()
            sum_over_ranks(values, ranks)
            _settle(ranks)
            tries.append(time.perf_counter() - started)
        return max(gather_objects([statistics.median(tries)], ranks))

    latency_s = seconds(1) / (2 * (ranks.world_size - 1))
    sent = Message("", Kind.all_reduce, 4 * num_elements).sent(ranks.world_size)
    speed = sent / seconds(num_elements)
    return Links(ranks.world_size, speed, speed, latency_s)
