"""Methods x known ratios x seeds under one protocol: same data, masks, backbone, budget and hold-out selection.

A cell is kept by the hash of its resolved configuration, data card and weights, so that a finished one never runs twice
and an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import statistics
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from scinet import config
from scinet.errors import ConfigError, nearest
from scinet.options import FusionOptions, Method, Options, TelemetryOptions
from scinet.rundir import write_text
from scinet.telemetry import MetricsLog, Silence, Voice

_KEYS = {"output", "base", "methods", "known_ratios", "seeds"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A comparison: what runs, and where its results are kept."""

    output: Path
    base: Path
    methods: dict[str, list[str]]
    known_ratios: list[float]
    seeds: list[int]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    method: str
    known_ratio: float
    seed: int
    options: Options


def compare(path: Path, seeds: Sequence[int] | None, jobs: int, voice: Voice) -> dict[str, Any]:
    """Run a comparison, print its table and write it as JSON and Markdown beside the cells.

    Args:
        path: a file of ``configs/compare``.
        seeds: instead of the file's.
        jobs: cells at once, one thread each.
        voice: for progress.

    Raises:
        ConfigError: if the file or one of its configurations is wrong.
    """
    plan = read_plan(path)
    if seeds is not None:
        plan = dataclasses.replace(plan, seeds=list(seeds))
    cells = list(expand(plan))
    folder = plan.output / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    results = dict(_run(cells, folder, jobs, voice))
    table = summarise(plan, cells, [results[number] for number in range(len(cells))])
    write_text(plan.output / "comparison.json", json.dumps(table, indent=1) + "\n")
    text = to_markdown(table)
    write_text(plan.output / "comparison.md", text)
    print(text)
    return table


def read_plan(path: Path) -> Plan:
    """Read a comparison's file.

    Raises:
        ConfigError: naming the key that is wrong.
    """
    tree = config.read_tree(path)
    for key in tree:
        if key not in _KEYS:
            raise ConfigError(f"{path}: unknown key '{key}'{nearest(key, _KEYS)}")
    for key in sorted(_KEYS - set(tree)):
        raise ConfigError(f"{path} has no '{key}'")
    methods = {str(name): [str(item) for item in overrides or []] for name, overrides in tree["methods"].items()}
    ratios, seeds = [float(ratio) for ratio in tree["known_ratios"]], [int(seed) for seed in tree["seeds"]]
    return Plan(Path(tree["output"]), path.parent / str(tree["base"]), methods, ratios, seeds)


def expand(plan: Plan) -> Iterator[Cell]:
    """Yield the cells; a seed decides mask, initialisation and order alike.

    Raises:
        ConfigError: if a configuration is wrong.
    """
    for method, overrides in plan.methods.items():
        for ratio in plan.known_ratios:
            for seed in plan.seeds:
                own = [f"data.known_ratio={ratio}", f"seed={seed}", f"data.mask_seed={seed}"]
                yield Cell(method, ratio, seed, config.load(plan.base, [*overrides, *own]))


def _run(cells: list[Cell], folder: Path, jobs: int, voice: Voice) -> Iterator[tuple[int, dict[str, Any]]]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker) as pool:
        futures = {pool.submit(run_cell, cell.options, folder): number for number, cell in enumerate(cells)}
        for done, future in enumerate(as_completed(futures), start=1):
            number = futures[future]
            result = future.result()
            cell = cells[number]
            detail = f"{cell.method} {cell.known_ratio:g} seed {cell.seed}: {result['test_map']:.2f}"
            voice.progress("cells", done, len(cells), detail)
            yield number, result


def _start_worker() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _leave_with_parent() -> None:
    """End this worker when the command is killed: it would train its queued cells for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_materials: dict[str, Any] = {}


def run_cell(options: Options, folder: Path) -> dict[str, Any]:
    """Return one cell's result, from its file if it has run before.

    Returns:
        test_map at the epoch selected on the hold-out, last_map, student_map, holdout_map, best_epoch.
    """
    from scinet import materials
    from scinet.distributed import initialise
    from scinet.telemetry import configure_logging

    configure_logging(is_first=False)
    ranks = initialise(options.train.collective_timeout_s)
    key = repr((options.data.path, options.data.cache_features, options.model, options.data.smallest_crop))
    if key not in _materials:
        _materials[key] = materials.gather(options, ranks, lambda *_: None)
    made = _materials[key]
    neutral = _neutral(options)
    described = [config.to_yaml(neutral), made.card.sha256, made.backbone.weights_sha256]
    path = folder / (hashlib.sha256("\n".join(described).encode()).hexdigest()[:16] + ".json")
    if path.is_file():
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result
    result = _train_cell(options, made, ranks)
    write_text(path, json.dumps(result | {"config": config.to_yaml(neutral)}, indent=1) + "\n")
    return result


def _neutral(options: Options) -> Options:
    """Return the options without what cannot change a result: names, telemetry, a baseline's fusion, which it lacks."""
    neutral = dataclasses.replace(options, name="cell", output="runs", baseline="", telemetry=TelemetryOptions())
    return neutral if options.method is Method.scinet else dataclasses.replace(neutral, fusion=FusionOptions())


def _train_cell(options: Options, made: Any, ranks: Any) -> dict[str, Any]:
    from scinet.evaluation.metrics import evaluate
    from scinet.running import zero_shot
    from scinet.trainer import Trainer

    if options.method is Method.zero_shot:
        value = zero_shot(options, made, ranks)["mean_average_precision"]
        return {"test_map": value, "last_map": value, "student_map": value, "holdout_map": None, "best_epoch": None}
    trainer = Trainer(options, made, ranks, MetricsLog(None), Silence())

    def test_map(use_teacher: bool) -> float:
        scores = trainer.score("test", use_teacher=use_teacher)
        return evaluate(scores.probabilities, scores.truth).mean_average_precision

    selected = 0.0
    while not trainer.is_finished:
        trainer.train_epoch()
        if trainer.evaluation_is_due and trainer.evaluate_holdout():
            selected = test_map(True)
    return {
        "test_map": selected,
        "last_map": test_map(True),
        "student_map": test_map(False),
        "holdout_map": trainer.progress.best_map,
        "best_epoch": trainer.progress.best_epoch,
    }


def summarise(plan: Plan, cells: list[Cell], results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation over seeds, per method and ratio."""
    rows = []
    for method in plan.methods:
        for ratio in plan.known_ratios:
            own = [
                result
                for cell, result in zip(cells, results, strict=True)
                if cell.method == method and cell.known_ratio == ratio
            ]
            row: dict[str, Any] = {"method": method, "known_ratio": ratio, "num_seeds": len(own)}
            for key in ("test_map", "last_map"):
                values = [result[key] for result in own]
                row[key] = statistics.fmean(values)
                row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
            rows.append(row)
    return {"seeds": plan.seeds, "known_ratios": plan.known_ratios, "rows": rows, "base": str(plan.base)}


def to_markdown(table: dict[str, Any]) -> str:
    """Return the table: test mAP at the epoch selected on the hold-out, mean and standard deviation over seeds."""
    ratios = table["known_ratios"]
    lines = ["| method | " + " | ".join(f"{ratio:.0%} known" for ratio in ratios) + " |"]
    lines.append("| --- |" + " --- |" * len(ratios))
    for method in dict.fromkeys(row["method"] for row in table["rows"]):
        own = {row["known_ratio"]: row for row in table["rows"] if row["method"] == method}
        shown = (f"{own[ratio]['test_map']:.2f} +- {own[ratio]['test_map_std']:.2f}" for ratio in ratios)
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"
