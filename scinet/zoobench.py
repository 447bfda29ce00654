"""``scinet bench zoo``: what each method of the zoo keeps and holds at any number of classes, on a synthetic stream.

Logits are drawn instead of computed, so that nothing but the methods is measured. Of each image a few labels are known,
as in collections with thousands of classes. Shapes: V views, G samples of the global batch, C classes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from scinet.data.batch import Batch
from scinet.distributed import Ranks
from scinet.errors import ConfigError
from scinet.model.label_graph import propagation
from scinet.model.network import Output
from scinet.objective import Phase
from scinet.options import Method, Options
from scinet.rehearsal import LiveBytes
from scinet.texttable import size, table
from scinet.zoo.catalogue import METHODS, Frame, build
from scinet.zoo.objective import ZooObjective

_KNOWN_AN_IMAGE = 8
_FLOAT = 4
_SEED = 0


@dataclass(frozen=True)
class Setting:
    """The synthetic stream, and how many of its steps are taken: N samples, C classes, G of a step, one rank."""

    num_samples: int
    num_classes: int
    batch_size: int
    num_steps: int


@dataclass(frozen=True)
class Found:
    """What a method took: bytes kept between steps, the most that a step holds above those, and seconds a step.

    A step's bytes are without logits and labels, which every method needs; ``seconds`` is the fastest step's.
    """

    method: Method
    kept: int
    step: int
    seconds: float


def report(setting: Setting, say: Callable[[str], None]) -> str:
    """Return a line for each method.

    Args:
        setting: sizes.
        say: told which method is running.
    """
    found: list[Found | tuple[Method, str]] = []
    for method in METHODS:
        say(method.value)
        try:
            found.append(measure(method, setting))
        except ConfigError as error:
            found.append((method, str(error)))
    unit = setting.batch_size * setting.num_classes * _FLOAT
    base = next(one.seconds for one in found if isinstance(one, Found) and one.method is Method.bce)
    rows = [
        (one.method.value, size(one.kept), size(one.step), f"{one.step / unit:.0f}", f"{one.seconds / base:.1f}")
        if isinstance(one, Found)
        else (one[0].value, "refused", "-", "-", "-")
        for one in found
    ]
    told = [f"{one[1]}\n" for one in found if not isinstance(one, Found)]
    header = ("method", "kept", "held in a step", "of [G, C] fp32", "time of bce's step")
    return f"{setting.num_samples:,} samples, {setting.num_classes:,} classes, G = {setting.batch_size}\n" + "".join(
        [table(header, rows), *told]
    )


def measure(method: Method, setting: Setting) -> Found:
    """Train a method on the stream, and return what it took.

    Raises:
        ConfigError: if it would keep more than ``zoo.memory_budget_mb``.
    """
    # unchecked: no head takes part, and one method wants its own
    options = dataclasses.replace(Options(), method=method)
    live = LiveBytes()
    with live:
        aim = _aim(options, setting)
        start = live.now
        steps = [live.peak_of(work) for work in _steps(aim, options, setting)]
        kept = live.now
    seconds = [_timed(work) for work in _steps(aim, options, setting)]
    return Found(method, max(start, kept), max(steps), min(seconds))


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _aim(options: Options, setting: Setting) -> ZooObjective:
    return ZooObjective(build(options, _frame(options, setting)), Ranks(0, 1, torch.device("cpu")))


def _steps(aim: ZooObjective, options: Options, setting: Setting) -> Iterator[Callable[[], None]]:
    """Yield the steps of the last epoch but one: whatever begins within a run has begun, and goes on."""
    epoch = options.train.epochs - 2
    for number, (logits, batch) in enumerate(_stream(options, setting)):
        yield partial(_train, aim, logits, batch, epoch, is_last=number + 1 == setting.num_steps)


def _train(aim: ZooObjective, logits: Tensor, batch: Batch, epoch: int, *, is_last: bool) -> None:
    """Take a step without a network: loss, gradient of the logits, memory."""
    phase = Phase(is_warm=True, epoch=epoch)

    def forward(_: Tensor) -> Output:
        return Output(logits, logits)

    look = aim.look([batch], forward, forward, has_gaps=False)
    loss = aim(Output(logits, logits), batch, phase, float(len(batch.observed)), look, 0).loss
    torch.autograd.backward(loss)
    logits.grad = None
    aim.update(look, phase)
    if is_last:
        aim.end_epoch(epoch)


def _frame(options: Options, setting: Setting) -> Frame:
    generator = torch.Generator().manual_seed(_SEED)

    def relation() -> Tensor:
        names = torch.randn(setting.num_classes, 64, generator=generator)
        correlation = options.correlation
        return propagation(torch.corrcoef(names), correlation.graph_top_k, correlation.temperature)

    return Frame(
        num_samples=setting.num_samples,
        num_classes=setting.num_classes,
        num_positives=_KNOWN_AN_IMAGE / 2,
        num_epochs=options.train.epochs,
        device=torch.device("cpu"),
        relation=relation,
        cosines=lambda inputs: torch.tanh(inputs[:, :1] * torch.linspace(-1, 1, setting.num_classes)),
    )


def _stream(options: Options, setting: Setting) -> Iterator[tuple[Tensor, Batch]]:
    """Yield logits [V * G, C] and their batch."""
    generator = torch.Generator().manual_seed(_SEED)
    size, num_classes, num_views = setting.batch_size, setting.num_classes, len(options.method.views)
    for number in range(setting.num_steps):
        logits = torch.randn(num_views * size, num_classes, generator=generator) - 3
        known = torch.randint(num_classes, (size, _KNOWN_AN_IMAGE), generator=generator)
        signs = torch.tensor([1, -1], dtype=torch.int8).repeat(_KNOWN_AN_IMAGE // 2).expand(size, -1)
        observed = torch.zeros(size, num_classes, dtype=torch.int8).scatter_(1, known, signs)
        index = (torch.arange(size) + number * size) % setting.num_samples
        batch = Batch(
            inputs=torch.randn(num_views * size, 1, generator=generator),
            observed=observed,
            truth=observed,
            index=index,
            ids=tuple(map(str, index.tolist())),
            valid=torch.ones(size, dtype=torch.bool),
        )
        yield logits.requires_grad_(), batch
