"""Whether a run fits into memory, said before it starts; and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from scinet import config, estimating, memory
from scinet.distributed import Ranks, from_first_rank, gather_objects
from scinet.engine import zero_config
from scinet.errors import ConfigError
from scinet.estimating import DataSize
from scinet.materials import Materials
from scinet.memory import Estimate, Subject
from scinet.model import backbone as model_backbone
from scinet.options import Memory, Method, Options
from scinet.paths import cache_directory
from scinet.room import Room, look, ranks_on_this_host
from scinet.texttable import size

_EASY = 0.5  # a run that takes less of what is free is worth one line only
_NUM_NAMED = 4
_MOST_RANKS = 1024


def check(options: Options, made: Materials, ranks: Ranks, say: Callable[[str], None]) -> None:
    """Refuse a run that would run out of memory, and say on the first rank what it takes. Collective.

    Raises:
        ConfigError: on all ranks alike, with the largest parts and the cheapest change that would fit.
    """
    if options.method is Method.zero_shot:
        return
    rooms = gather_objects([look(ranks.device, ranks_on_this_host(ranks.world_size))], ranks)

    def judge() -> None:
        subject = Subject(estimating.of_card(made.card), made.backbone, made.card.class_names, ranks.device)
        found = memory.estimate(options, subject, ranks.world_size)
        tightest = min(rooms, key=lambda room: _left(found, room))
        if _left(found, tightest) < 0:
            raise ConfigError(refusal(options, subject, ranks.world_size, tightest))
        say(_line(found, tightest) if is_easy(found, tightest) else memory.shown(found) + _line(found, tightest))

    from_first_rank(judge, ranks)


def planned(data: DataSize, options: Options, width: int | None, world_size: int) -> str:
    """Return every estimate of a run that is not about to start: data, and a rank's memory if all ranks were here.

    Args:
        data: sizes of the data set.
        options: of the run.
        width: D for the tables of the data; None takes the backbone's.
        world_size: ranks.

    Raises:
        ConfigError: if the backbone's shapes cannot be had.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = model_backbone.skeleton(options.model, cache_directory(options.data.cache_dir))
    names = tuple(f"class name {number:05d}" for number in range(data.num_classes))
    subject = Subject(data, backbone, names, device)
    found = memory.estimate(options, subject, world_size)
    room = look(device, min(world_size, torch.cuda.device_count() or world_size))
    verdict = _line(found, room) if _left(found, room) >= 0 else refusal(options, subject, world_size, room)
    return (
        f"{estimating.report(data, options, width or backbone.width, world_size)}\n{memory.shown(found)}"
        f"\nOn this machine's {device.type}: {verdict}.\nNot in it: Python and torch themselves.\n"
    )


def _left(found: Estimate, room: Room) -> float:
    """Return what would be left where it is tightest; negative if a run does not fit."""
    left = room.host - found.peak(host=True)
    return left if room.device is None else min(left, room.device - found.peak(host=False))


def is_easy(found: Estimate, room: Room) -> bool:
    """Return whether a run takes little of what is free."""
    on_gpu = room.device is None or found.peak(host=False) < _EASY * room.device
    return on_gpu and found.peak(host=True) < _EASY * room.host


def _line(found: Estimate, room: Room) -> str:
    on_host = f"{size(found.peak(host=True))} of {size(room.host)} free on the host"
    if room.device is None:
        return f"memory of a rank, beyond the towers: {on_host}"
    on_gpu = f"{size(found.peak(host=False))} of {size(room.device)} free on the GPU"
    return f"memory of a rank, beyond the towers: {on_gpu}, {on_host}"


def refusal(options: Options, subject: Subject, world_size: int, room: Room) -> str:
    """Return why a run cannot start, in a sentence: what it would take, of what, and what to change."""
    found = memory.estimate(options, subject, world_size)
    lacks_gpu = room.device is not None and found.peak(host=False) > room.device
    free = room.device if lacks_gpu and room.device is not None else room.host
    where = f"on the GPU of host {room.host_name}" if lacks_gpu else f"for each rank on host {room.host_name}"
    host = not lacks_gpu
    largest = sorted((p for p in found.on(host=host) if not p.is_there), key=lambda part: -part.num_bytes)
    named = ", ".join(f"{size(part.num_bytes)} {part.what}" for part in largest[:_NUM_NAMED])
    needed = f"a rank would take {size(found.peak(host=host))} more, {size(free)} are free {where} ({named})"
    best, least = "", _left(found, room)
    for words, changed, ranks in changes(options, world_size, has_gpu=found.has_gpu):
        try:
            left = _left(memory.estimate(changed, subject, ranks), room)
        except ConfigError:
            continue  # a batch that does not divide
        if left >= 0:
            return f"{needed}: {words}"
        if left > least:
            best, least = words, left
    nearest = f" ({best}: it comes nearest and lacks {size(-least)})" if best else ""
    return f"{needed}: no single change makes it fit{nearest}; take a smaller train.global_batch_size or model too"


def changes(options: Options, world_size: int, *, has_gpu: bool) -> Iterator[tuple[str, Options, int]]:
    """Yield what a user could change, the cheapest first: its words, the options then, and the number of ranks.

    What leaves the results as they are comes first, from no more time to a third more of it; then more machines, and
    last what trains differently.
    """
    train = options.train
    micro_batch = train.global_batch_size // (train.accumulation_steps * world_size)
    factor = 2
    while micro_batch % factor == 0:
        steps = train.accumulation_steps * factor
        changed = config.replace(options, train__accumulation_steps=steps)
        yield f"set train.accumulation_steps={steps}", changed, world_size
        factor *= 2
    zero = zero_config(options)
    for stage in range(int(zero.stage) + 1, 4 if world_size > 1 else 0):
        section: dict[str, Any] = {"zero_optimization": {"stage": stage}}
        yield f"set {_assigned(section)}", config.replace(options, deepspeed=section), world_size
    if not options.model.activation_checkpointing:
        changed = config.replace(options, model__activation_checkpointing=True)
        yield "set model.activation_checkpointing=true", changed, world_size
    if has_gpu and zero.offload_optimizer is None:
        section = {"zero_optimization": {"stage": max(1, int(zero.stage)), "offload_optimizer": {"device": "cpu"}}}
        yield f"set {_assigned(section)}", config.replace(options, deepspeed=section), world_size
    ranks = 2 * world_size
    while ranks <= _MOST_RANKS and train.global_batch_size % (ranks * train.accumulation_steps) == 0:
        yield f"start {ranks} ranks, each with as much memory", options, ranks
        ranks *= 2
    if options.fusion.memory is Memory.dense and options.fusion.enabled:
        changed = config.replace(options, fusion__memory="none", fusion__momentum=0.0)
        yield "set fusion.memory=none fusion.momentum=0, which changes the results", changed, world_size


def _assigned(section: Mapping[str, Any], prefix: str = "deepspeed") -> str:
    words = []
    for key, value in section.items():
        if isinstance(value, dict):
            words.append(_assigned(value, f"{prefix}.{key}"))
        else:
            words.append(f"{prefix}.{key}={str(value).lower()}")
    return " ".join(words)
