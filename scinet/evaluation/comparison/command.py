"""``scinet compare``: train what is missing, side by side, and write table, CSV, Markdown and page."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from scinet import preflight, texttable
from scinet.errors import ConfigError, Preempted, TrainingError
from scinet.evaluation.comparison import keys, plan, scoring, tables, training, workers
from scinet.evaluation.comparison.keys import Facts
from scinet.evaluation.comparison.plan import Cell, Plan
from scinet.evaluation.comparison.scoring import Entry
from scinet.evaluation.comparison.store import Record, Store, TestSet
from scinet.evaluation.comparison.workers import Task
from scinet.options import Method
from scinet.report import comparison_page
from scinet.rundir import exclusive, write_text
from scinet.telemetry import Voice

_MOST_NAMED = 12
_PATIENCE_S = 60.0


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The cells of a plan, what each is kept by, and what is finished."""

    plan: Plan
    cells: list[Cell]
    keys: list[str]
    store: Store
    records: dict[str, Record]

    @classmethod
    def of(cls, wanted: Plan, facts: Facts, cells: list[Cell]) -> _Grid:
        store = Store(wanted.cells_folder)
        found = [keys.key_of(cell.options, facts) or "" for cell in cells]
        kept = {key: store.find(key, test_peak=wanted.test_peak) for key in found if key}
        return cls(wanted, cells, found, store, {key: record for key, record in kept.items() if record})

    def missing(self) -> dict[str, Cell]:
        """Return the first cell of each key that is not finished."""
        found: dict[str, Cell] = {}
        for key, cell in zip(self.keys, self.cells, strict=True):
            if key not in self.records:
                found.setdefault(key, cell)
        return found


def read(path: Path, *, seeds: Sequence[int] | None = None, methods: str | None = None) -> Plan:
    """Return the plan of a file, or a part of it.

    Raises:
        ConfigError: what is wrong with it.
    """
    wanted = plan.read(path)
    wanted = wanted if seeds is None else plan.with_seeds(wanted, seeds)
    return wanted if methods is None else plan.with_methods(wanted, methods)


def compare(wanted: Plan, jobs: int | None, voice: Voice) -> dict[str, Any]:
    """Train the cells that are not finished, print the tables and write them.

    Args:
        wanted: what to compare.
        jobs: cells at once; None: as many as there are GPUs, or else cores.
        voice: for progress.

    Raises:
        ConfigError: if a configuration is wrong, or data or weights cannot be had.
        TrainingError: at the end, naming the cells that failed.
        Preempted: SIGTERM came; finished cells stay.
    """
    cells = plan.expand(wanted)
    checked = {(c.options.data.path, c.options.data.mask_file, c.options.method is Method.zero_shot): c for c in cells}
    cards = {card.sha256: card for card in (preflight.check(cell.options) for cell in checked.values())}
    for doubt in (doubt for card in cards.values() for doubt in preflight.doubts(card)):
        voice.say(f"warning: {doubt}")
    facts = keys.look(cells)
    wanted.cells_folder.mkdir(parents=True, exist_ok=True)
    keys.remember(facts, _facts_path(wanted))
    grid = _Grid.of(wanted, facts, cells)
    failures = _train(grid, jobs, voice)
    grid = _Grid.of(wanted, facts, cells)
    tree = _write(grid, failures)
    if failures:
        named = "; ".join(f"{_names(grid, key)}: {text}" for key, text in list(failures.items())[:_MOST_NAMED])
        raise TrainingError(
            f"{len(failures)} cell(s) failed and are missing in the tables ({named}): the same command tries them again"
        )
    return tree


def recompute(wanted: Plan, jobs: int | None, voice: Voice) -> dict[str, Any]:
    """Make the tables from the kept predictions alone; nothing is trained, neither data nor weights are read.

    Args:
        wanted: what to compare.
        jobs: cells at once; None: as many as cores.
        voice: for progress.

    Raises:
        ConfigError: naming the cells that are missing.
        DataError: predictions are damaged.
    """
    grid = _Grid.of(wanted, keys.recall(_facts_path(wanted)), plan.expand(wanted))
    missing = [str(cell) for key, cell in zip(grid.keys, grid.cells, strict=True) if key not in grid.records]
    if missing:
        more = f"; and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
        raise ConfigError(
            f"--recompute lacks {len(missing)} of {len(grid.cells)} cells ({'; '.join(missing[:_MOST_NAMED])}{more}): "
            "run the command without it first"
        )
    test_sets = _test_sets(grid)

    def judged(key: str) -> Record:
        record = grid.records[key]
        found = {
            moment: training.judge(grid.store.predictions(key, moment), test_sets[record.truth].truth)
            for moment in grid.records[key].judgements
        }
        return dataclasses.replace(record, judgements=found)

    # many small operations: a thread a cell beats many threads an operation
    with training.threads(1), ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        for done, (key, record) in enumerate(
            zip(list(grid.records), pool.map(judged, list(grid.records)), strict=True)
        ):
            grid.records[key] = record
            voice.progress("cells", done + 1, len(grid.records))
    return _write(grid, {})


def list_cells(wanted: Plan) -> str:
    """Return a table of the cells: which are done, which would run, which are the same as an earlier one."""
    cells = plan.expand(wanted)
    grid = _Grid.of(wanted, keys.look(cells), cells)
    seen: dict[str, Cell] = {}
    rows = []
    for key, cell in zip(grid.keys, grid.cells, strict=True):
        first = seen.setdefault(key, cell)
        state = "done" if key in grid.records else "would run" if first is cell else "shares another's run"
        rows.append([cell.method, cell.column.name, cell.seed, state, key])
    num_run, num_done = len(grid.missing()), sum(key in grid.records for key in grid.keys)
    return texttable.table(("method", "column", "seed", "state", "key"), rows) + (
        f"{num_done} of {len(cells)} cells are done, {num_run} trainings would run\n"
    )


def default_jobs() -> int:
    """Return how many cells run at once unless told: one a GPU, or else one a core that this process may use."""
    return len(_gpus()) or len(os.sched_getaffinity(0))


def _gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(number) for number in range(count)])[:count]


def _train(grid: _Grid, jobs: int | None, voice: Voice) -> dict[str, str]:
    """Train what is missing, and return by key why a cell failed."""
    missing = grid.missing()
    tasks = [
        Task(key, cell.options, keys.effective(cell.options), grid.plan.test_peak) for key, cell in missing.items()
    ]
    if not tasks:
        return {}
    jobs = min(jobs or default_jobs(), len(tasks))
    num_kept = len(set(grid.keys)) - len(tasks)
    voice.say(f"{len(tasks)} cells to train, {jobs} at once; {num_kept} are kept in {grid.store.folder}")
    failures: dict[str, str] = {}
    num_done = 0
    waited: set[str] = set()
    try:
        with _stoppable(), contextlib.closing(workers.carry_out(tasks, grid.store.folder, jobs, _gpus())) as replies:
            for task, reply in replies:
                if task is None:
                    voice.progress(reply.text, reply.done, reply.total)
                    continue
                cell = missing[task.key]
                if reply.state == "busy":
                    if task.key not in waited:
                        voice.say(f"{cell}: another command trains it, waiting")
                    waited.add(task.key)
                    continue
                if reply.state == "failed":
                    failures[task.key] = reply.text
                    voice.say(f"{cell} failed: {reply.text}")
                num_done += reply.state == "done"
                voice.progress("cells", num_done + len(failures), len(tasks), _detail(grid, task, cell))
    except _Stopped as stopped:
        left = f"{num_done} of {len(tasks)} cells were trained, they stay: the same command goes on"
        if stopped.number == signal.SIGTERM:
            raise Preempted(f"stopped by SIGTERM; {left}") from stopped
        voice.say(f"interrupted; {left}")
        raise KeyboardInterrupt from stopped
    return failures


def _detail(grid: _Grid, task: Task, cell: Cell) -> str:
    record = grid.store.find(task.key, test_peak=task.test_peak)
    return f"{cell}: {record.judgements['selected'].mean_average_precision:.2f}" if record else str(cell)


class _Stopped(BaseException):
    """A signal came; no handler of errors takes it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into an exception; the workers are ended before another counts."""

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(grid: _Grid, failures: dict[str, str]) -> dict[str, Any]:
    """Print the tables and write all files, one command at a time."""
    entries = [
        Entry(cell, key, grid.records.get(key), failures.get(key, ""))
        for key, cell in zip(grid.keys, grid.cells, strict=True)
    ]
    tree = scoring.summarise(grid.plan, entries, _test_sets(grid))
    text, output = tables.markdown(tree), grid.plan.output
    with exclusive(output / ".lock", f"{output} is being written", patience_s=_PATIENCE_S):
        write_text(output / "comparison.json", json.dumps(tree, indent=1) + "\n")
        write_text(output / "comparison.csv", tables.to_csv(tree))
        write_text(output / "comparison.md", text)
        page = comparison_page.write(output, tree)
    print(f"{text}\npage: {page}")
    return tree


def _test_sets(grid: _Grid) -> dict[str, TestSet]:
    return {name: grid.store.test_set(name) for name in {record.truth for record in grid.records.values()}}


def _names(grid: _Grid, wanted: str) -> str:
    return " = ".join(str(cell) for key, cell in zip(grid.keys, grid.cells, strict=True) if key == wanted)


def _facts_path(wanted: Plan) -> Path:
    return wanted.output / "facts.json"
