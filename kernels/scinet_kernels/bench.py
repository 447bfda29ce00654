"""`scinet bench fusion`: our operators against what a user would write, as ratios to the bare matrix products.

A machine may be busy: contestants take turns within one process, every figure is the minimum over the turns, and it is
divided by the minimum of the unit (the products alone) in the same turns. Where the unit itself swings, the turns are
taken again, and if it still does the row says `unstable`. Memory is the growth of a fresh process around one call, seen
from the operating system.
"""

import ctypes
import dataclasses
import functools
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from scinet_kernels import contestants, gaussian_propagate, pearson
from scinet_kernels.contestants import BANDWIDTH, Contestant, Inputs

# Median over minimum of the unit beyond which a row cannot be trusted.
_STEADY = 1.3
_LARGEST_MATRICES_SHARE = 0.5
_CHECKED_ROWS = 256
_PEAK_SIZE = 8192
# glibc's parameters of mallopt, and the values that it starts with
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_TRIM_THRESHOLD, _MMAP_MAX = 128 << 10, 65536


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is compared.

    Attributes:
        operator: "propagate" or "pearson".
        rows: N.
        width: D of propagate, 0 for pearson.
        columns: C.
        repeats: turns of each contestant.
        has_backward: time forward and backward together; not for pearson, whose streamed state has no gradient.
        device: "cpu" or "cuda".

    """

    operator: str
    rows: int
    width: int
    columns: int
    repeats: int
    has_backward: bool
    device: str

    @property
    def direction(self) -> str:
        """The pass in words."""
        return "forward + backward" if self.has_backward else "forward"

    @property
    def unit_flop(self) -> int:
        """Operations of the unit, the bare products of the forward."""
        if self.operator == "pearson":
            return 12 * self.rows * self.columns**2
        return 2 * self.rows**2 * (self.width + self.columns)


@dataclasses.dataclass(frozen=True)
class Row:
    """One contestant's figures; None where it was not run or they were not asked for.

    Attributes:
        operator: as in the setting.
        rows: N.
        has_backward: as in the setting.
        contestant: its name.
        note: why it was skipped; "unstable"; that the process whose memory was measured was killed.
        ratio: its time over that of the bare products of the forward.
        seconds: its time.
        grown_mib: growth of a fresh process around one call.
        error: largest difference from the float64 result, relative to its largest entry.
        peak_share: the unit's operations over its time, as a share of a large bf16 product's rate; only on a GPU.

    """

    operator: str
    rows: int
    has_backward: bool
    contestant: str
    note: str
    ratio: float | None = None
    seconds: float | None = None
    grown_mib: float | None = None
    error: float | None = None
    peak_share: float | None = None


def run(
    settings: Sequence[Setting], *, with_compiled: bool, with_memory: bool, say: Callable[[str], None]
) -> list[Row]:
    """Measure settings one after the other.

    Args:
        settings: what is compared.
        with_compiled: let `torch.compile` compete.
        with_memory: measure memory too, a fresh process for each contestant (CPU only).
        say: told what is being measured.

    """
    rows = []
    with _freed_memory_kept():
        for setting in settings:
            say(f"{setting.operator}, {setting.rows} rows, {setting.direction}")
            rows += measure(setting, with_compiled=with_compiled, with_memory=with_memory)
    return rows


def measure(setting: Setting, *, with_compiled: bool, with_memory: bool) -> list[Row]:
    """Time all contestants of a setting, taking turns.

    Args:
        setting: what is compared.
        with_compiled: let `torch.compile` compete.
        with_memory: measure memory, a fresh process for each contestant (CPU only).

    """
    inputs = _make_inputs(setting)
    field = _field(setting, with_compiled)
    notes = {contestant.name: _reason_to_skip(contestant, setting) for contestant in field}
    ready = [contestant for contestant in field if not notes[contestant.name]]
    errors = _errors(ready, inputs, setting)
    seconds, is_steady = _times(ready, inputs, setting)
    unit = seconds[field[0].name]
    peak = _peak_flop_per_s() if setting.device == "cuda" else None
    rows = []
    for name, note in notes.items():
        row = Row(setting.operator, setting.rows, setting.has_backward, name, note)
        if name in seconds:
            looks_at_memory = with_memory and setting.device == "cpu" and name != contestants.COMPILED
            grown = _memory(name, setting) if looks_at_memory else None
            remarks = ["unstable"] * (not is_steady) + ["no memory figure: killed"] * (
                looks_at_memory and grown is None
            )
            row = dataclasses.replace(
                row,
                note=", ".join(remarks),
                ratio=seconds[name] / unit,
                seconds=seconds[name],
                grown_mib=grown,
                error=errors[name],
                peak_share=setting.unit_flop / seconds[name] / peak if peak else None,
            )
        rows.append(row)
    return rows


def _make_inputs(setting: Setting) -> Inputs:
    device = torch.device(setting.device)
    return contestants.make_inputs(setting.rows, setting.width, setting.columns, device, torch.float32)


def _field(setting: Setting, with_compiled: bool) -> list[Contestant]:
    if setting.operator == "pearson":
        return contestants.of_correlation()
    backends = ["triton", "cpu"] if setting.device == "cuda" else ["cpu"]
    return contestants.of_propagation(backends) + ([contestants.compiled_form()] if with_compiled else [])


def needed_bytes(setting: Setting) -> int:
    """Return about what inputs, their float64 copies and the unit take, whoever competes.

    Args:
        setting: what would be compared.

    """
    panel = 0 if setting.operator == "pearson" else contestants.PANEL_ROWS
    return 4 * setting.rows * (8 * (setting.width + 2 * setting.columns) + panel)


def available_bytes(device: str) -> int:
    """Return the memory of the GPU or of the machine."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _reason_to_skip(contestant: Contestant, setting: Setting) -> str:
    needed = contestant.stored_matrices * setting.rows**2 * 4
    if needed > _LARGEST_MATRICES_SHARE * available_bytes(setting.device):
        return f"skipped: holds {needed / 2**30:.0f} GiB"
    return ""


def _errors(ready: Sequence[Contestant], inputs: Inputs, setting: Setting) -> dict[str, float | None]:
    """Compare with the definition in float64, on a few query rows where all would take too long."""
    values = inputs.values.double()
    step = 1
    if setting.operator == "pearson":
        exact = pearson(values, inputs.known, backend="reference")[0]
    else:
        step = max(1, setting.rows // _CHECKED_ROWS)
        points = inputs.points.double()
        exact = gaussian_propagate(points[::step], values, keys=points, bandwidth=BANDWIDTH, backend="reference")
    errors: dict[str, float | None] = {}
    for contestant in ready:
        errors[contestant.name] = None
        if contestant.is_exact:
            with torch.no_grad():
                found = contestant.run(inputs)[::step].to(exact.device, exact.dtype)
            errors[contestant.name] = ((found - exact).abs().max() / exact.abs().max()).item()
    return errors


def _times(ready: Sequence[Contestant], inputs: Inputs, setting: Setting) -> tuple[dict[str, float], bool]:
    """Return each contestant's least seconds, and whether the unit's times lie close together."""
    for contestant in ready:
        _run(contestant, inputs, setting.has_backward)  # warm caches and allocator
    for _ in range(2):
        samples: dict[str, list[float]] = {contestant.name: [] for contestant in ready}
        for _ in range(setting.repeats):
            for contestant in ready:
                samples[contestant.name].append(_run(contestant, inputs, setting.has_backward))
        unit = samples[ready[0].name]
        is_steady = statistics.median(unit) <= _STEADY * min(unit)
        if is_steady:
            break
    return {name: min(taken) for name, taken in samples.items()}, is_steady


def _run(contestant: Contestant, inputs: Inputs, has_backward: bool) -> float:
    """Run once and return the seconds."""
    # the unit stays the bare products of the forward: backward rows are in the same unit
    differentiates = has_backward and contestant.is_exact
    points = inputs.points.detach().requires_grad_(differentiates)
    values = inputs.values.detach().requires_grad_(differentiates)
    given = dataclasses.replace(inputs, points=points, values=values)
    _synchronise(inputs)
    started = time.perf_counter()
    with torch.set_grad_enabled(differentiates):
        result = contestant.run(given)
        if differentiates:
            torch.autograd.backward(result, inputs.signal)
    _synchronise(inputs)
    return time.perf_counter() - started


def _synchronise(inputs: Inputs) -> None:
    if inputs.points.is_cuda:
        torch.cuda.synchronize()


@functools.lru_cache
def _peak_flop_per_s() -> float:
    """The rate of a large square bf16 product on this GPU."""
    square = torch.randn(_PEAK_SIZE, _PEAK_SIZE, device="cuda", dtype=torch.bfloat16)
    product = Contestant("peak", lambda given: given.points @ given.points, is_exact=False)
    inputs = Inputs(square, square, square, square)
    return 2 * _PEAK_SIZE**3 / min(_run(product, inputs, has_backward=False) for _ in range(10))


def _memory(name: str, setting: Setting) -> float | None:
    """Return the growth of a fresh process around one warmed call, MiB; None if the system kills it."""
    context = multiprocessing.get_context("spawn")
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        try:
            return pool.submit(_grown, name, setting).result()
        except BrokenProcessPool:
            return None


def _grown(name: str, setting: Setting) -> float:
    contestant = next(found for found in _field(setting, with_compiled=False) if found.name == name)
    for one in (dataclasses.replace(setting, rows=64), setting):
        inputs = _make_inputs(one)
        gc.collect()
        # what making the inputs left behind would hide growth
        _c_library("malloc_trim", 0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts from here
        before = _status("VmRSS")
        _run(contestant, inputs, setting.has_backward)
    return max(0, _status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """Return a figure of this process in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def _c_library(function: str, *arguments: int) -> None:
    """Call a function of glibc; other C libraries have none of those used here."""
    found = getattr(ctypes.CDLL(None), function, None)
    if found is not None:
        found(*arguments)


@contextmanager
def _freed_memory_kept() -> Iterator[None]:
    """Let glibc keep what is freed: fresh pages would cost those that store N x N more than their arithmetic."""
    _c_library("mallopt", _M_MMAP_MAX, 0)
    _c_library("mallopt", _M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        _c_library("mallopt", _M_MMAP_MAX, _MMAP_MAX)
        _c_library("mallopt", _M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
        _c_library("malloc_trim", 0)


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "operator": lambda row: row.operator,
    "rows": lambda row: str(row.rows),
    "pass": lambda row: "forward + backward" if row.has_backward else "forward",
    "contestant": lambda row: row.contestant,
    "time / GEMM": lambda row: _shown(row.ratio, ".2f"),
    "seconds": lambda row: _shown(row.seconds, ".4f"),
    "grown MiB": lambda row: _shown(row.grown_mib, ".0f"),
    "error": lambda row: _shown(row.error, ".1e"),
    "of bf16 peak": lambda row: _shown(row.peak_share, ".1%"),
    "note": lambda row: row.note,
}


def report(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table, with the share of the peak only where there is one."""
    has_peak = any(row.peak_share is not None for row in rows)
    names = [name for name in _COLUMNS if has_peak or name != "of bf16 peak"]
    lines = [names, ["---"] * len(names), *([_COLUMNS[name](row) for name in names] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def to_json(rows: Sequence[Row]) -> str:
    """Return the rows and the environment as JSON."""
    whole = {"environment": environment(), "rows": [dataclasses.asdict(row) for row in rows]}
    return json.dumps(whole, indent=1) + "\n"


def environment() -> dict[str, Any]:
    """Return what a reader of the figures has to know."""
    return {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
