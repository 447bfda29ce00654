"""``scinet bench memory``: the estimate of a run's memory beside what the run takes.

Measured is the growth of each rank's resident memory (on a GPU: of what torch has allocated there) from where the
estimate is made to the highest point of a few training steps and an evaluation of the hold-out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from scinet import config, estimating, materials, memory
from scinet.distributed import Ranks, gather_objects, initialise, shut_down
from scinet.errors import ConfigError
from scinet.memory import Subject
from scinet.options import Method, Options
from scinet.telemetry import MetricsLog, Silence
from scinet.texttable import size, table
from scinet.trainer import Trainer

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def report(options: Options, num_steps: int, say: Callable[[str], None]) -> str:
    """Return the estimate's parts and its highest point beside the measured one. Collective.

    Args:
        options: of the run; nothing is written into its directory.
        num_steps: training steps, of which the second is the first with all of the optimiser's state.
        say: told what is being done.

    Raises:
        ConfigError: if there is nothing to train, or this machine does not tell a process its highest point.
    """
    if options.method is Method.zero_shot:
        raise ConfigError("method=zero_shot trains nothing: there is no step whose memory could be measured")
    ranks = initialise(options.train.collective_timeout_s)
    try:
        return _report(config.replace(options, train__max_steps=num_steps), ranks, say)
    finally:
        shut_down()


def _report(options: Options, ranks: Ranks, say: Callable[[str], None]) -> str:
    made = materials.gather(options, ranks, lambda *_: None)
    subject = Subject(estimating.of_card(made.card), made.backbone, made.card.class_names, ranks.device)
    found = memory.estimate(options, subject, ranks.world_size)
    # what is cached has been read by now
    parts = tuple(
        dataclasses.replace(part, is_there=part.is_there or part.what == memory.CACHED) for part in found.parts
    )
    found = dataclasses.replace(found, parts=parts)
    say("training")
    start = _restart(ranks.device)
    trainer = Trainer(options, made, ranks, MetricsLog(None), Silence())
    trainer.train_epoch()
    say("evaluating")
    trainer.evaluate_holdout()
    taken = max(gather_objects([_highest(ranks.device) - start], ranks))
    estimated = found.peak(host=not found.has_gpu)
    rows = [(size(estimated), "estimated"), (size(taken), f"measured, {estimated / taken:.2f} of it estimated")]
    if found.has_gpu:
        rows = [(amount, f"{what}, on the GPU") for amount, what in rows]
    return memory.shown(found) + "\nbeyond what is there before training\n" + table(("size", "what"), rows)


def _restart(device: torch.device) -> int:
    """Return what is taken now, and forget how much it has been."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        _RESET.write_text("5")
    except OSError as error:
        raise ConfigError(f"{_RESET} cannot be written ({error}): memory is measured on Linux or on a GPU") from error
    return _status("VmRSS")


def _highest(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
