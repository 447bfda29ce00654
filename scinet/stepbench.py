"""``scinet bench step``: what a training step costs beyond its encoder, beside open_clip's own step; and a real run.

Contestants take turns on random images in memory; a ratio is that of two steps of the same turn. Memory is the highest
point of the tensors that an operator touches in a step of its own: on the CPU all storages, on a GPU what torch has
allocated.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable

import torch

from scinet import contestants, materials, pairing
from scinet.contestants import VIEWS, Contestant
from scinet.distributed import initialise, shut_down
from scinet.options import Options
from scinet.pairing import Verdict
from scinet.rehearsal import LiveBytes
from scinet.runbench import real_run

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MOST_TIME, _MOST_MEMORY = 1.10, 1.15


def report(options: Options, device: str, repeats: int, num_steps: int, say: Callable[[str], None]) -> str:
    """Return what each contestant took, and the ratios with their targets, those of a short real run included.

    Args:
        options: of the run.
        device: "cpu" or "cuda".
        repeats: turns of each contestant, after one that warms up.
        num_steps: steps of the real run.
        say: told what is being measured.

    Raises:
        ConfigError: if the configuration does not train SCINet, or data or weights cannot be had.
    """
    tuned = contestants.tuned(options)
    ranks = initialise(options.train.collective_timeout_s)
    _keep_memory()
    try:
        made = materials.gather(tuned, ranks, lambda *_: None)
        competing = [
            make(tuned, made, ranks) for make in (contestants.scinet, contestants.encoder, contestants.open_clip)
        ]
        text, verdicts = _compare(competing, repeats, torch.device(device), say)
        del competing
        verdicts += real_run(tuned, made, ranks, num_steps, say)
        if options.data.cache_features:
            cached = materials.gather(options, ranks, lambda what, done, total: say(f"{what}: {done} of {total}"))
            verdicts += real_run(options, cached, ranks, num_steps, say)
        title = (
            f"{made.backbone.name} towers, the image tower trained, batches of {tuned.train.global_batch_size} samples "
            f"in {VIEWS} views of {tuned.model.image_size} px, {made.card.num_classes} classes, {device}, "
            f"threads: {torch.get_num_threads()}; the median of {repeats} turns.\n\n"
        )
        return f"{title}{text}\n{pairing.table(verdicts)}"
    finally:
        shut_down()


def _compare(
    competing: list[Contestant], repeats: int, device: torch.device, say: Callable[[str], None]
) -> tuple[str, list[Verdict]]:
    """Let SCINet, its encoder and open_clip take turns; return the figures of each, and SCINet's ratios."""
    steps = [contestant.step for contestant in competing]
    taken = pairing.take_turns(steps, repeats, lambda: pairing.synchronise(device), say)
    say("memory")
    peaks = [_peak(contestant, device) for contestant in competing]
    lines = ["| contestant | image passes | s/step | ms/pass | peak MiB |\n| --- | --- | --- | --- | --- |\n"]
    for contestant, samples, peak in zip(competing, taken, peaks, strict=True):
        seconds, passes = statistics.median(samples), contestant.passes
        lines.append(
            f"| {contestant.name} | {passes:,} | {seconds:.3f} | {1e3 * seconds / passes:.2f} | {peak / 2**20:,.0f} |\n"
        )
    ours, bare, clip = competing
    beside = tuple(mine / other for mine, other in zip(taken[0], taken[1], strict=True))
    a_pass = tuple(mine / ours.passes * clip.passes / other for mine, other in zip(taken[0], taken[2], strict=True))
    verdicts = [
        Verdict(f"time of a step: {ours.name} / {bare.name}", beside, _MOST_TIME),
        Verdict(f"highest memory of a step: {ours.name} / {bare.name}", (peaks[0] / peaks[1],), _MOST_MEMORY),
        Verdict(f"time of an image pass: {ours.name} / {clip.name}", a_pass),
    ]
    return "".join(lines), verdicts


def _keep_memory() -> None:
    """Let glibc keep what is freed: fresh pages cost as much as the work on them, and whoever comes first pays."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except OSError:
        return  # no glibc
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)


def _peak(contestant: Contestant, device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated()
        contestant.step()
        return int(torch.cuda.max_memory_allocated() - others)
    with LiveBytes() as live:
        contestant.step()
    return int(live.peak)
