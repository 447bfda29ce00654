"""Whether two finished runs of one configuration came to the same, bit by bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from scinet.rundir import RunDirectory, read_evaluation
from scinet.telemetry import read_metrics

_CLOCKS = {"samples_per_second", "data_wait_share", "seconds"}


def differences(one: RunDirectory, other: RunDirectory) -> list[str]:
    """Return what is not equal in two finished runs, in words; clocks do not count.

    Compared are metrics, evaluation, the selected weights, and all tensors of the checkpoints that both
    have kept.
    """
    found = []
    rows, others = ([_timeless(row) for row in read_metrics(run.metrics)] for run in (one, other))
    if len(rows) != len(others):
        found.append(f"{len(rows)} rows of metrics and {len(others)}")
    for row, its in zip(rows, others, strict=False):
        keys = sorted(key for key in row.keys() | its.keys() if row.get(key) != its.get(key))
        if keys:
            found.append(f"'{keys[0]}' at step {row['step']}: {row.get(keys[0])} and {its.get(keys[0])}")
            break
    if _timeless(read_evaluation(one)) != _timeless(read_evaluation(other)):
        found.append(one.evaluation.name)
    for path in sorted((one.checkpoints / "selected").iterdir()):
        same = other.checkpoints / "selected" / path.name
        if not same.is_file() or _digest(path) != _digest(same):
            found.append(f"selected/{path.name}")
    # not always the last one: the disk may have been full when it was due
    tags = [{path.name for path in run.checkpoints.glob("step-*")} for run in (one, other)]
    if not tags[0] & tags[1]:
        found.append("there is no checkpoint of the same step")
    for tag in sorted(tags[0] & tags[1]):
        if _checksums(one, tag) != _checksums(other, tag):
            found.append(f"tensors of the checkpoint {tag}")
    return found


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in _CLOCKS}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksums(run: RunDirectory, tag: str) -> Any:
    # read without scinet.checkpoint, which would load torch beside the runs
    return json.loads((run.checkpoints / tag / "manifest.json").read_text(encoding="utf-8"))["parts"]
