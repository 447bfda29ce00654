"""``scinet data validate``, ``inspect``, ``mask`` and ``estimate``: look at a data set before training on it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder made by scinet data build.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_WIDEST_CELL = 160


def register(data_app: typer.Typer) -> None:
    """Add the commands to ``scinet data``."""
    data_app.command("validate")(validate)


def validate(
    directory: Folder,
    json_: AsJson = False,
    jobs: Annotated[int, typer.Option(min=0, max=256, help="Processes that read shards; 0: one a core.")] = 0,
) -> None:
    """Read every shard, label and image and list all that is wrong: scinet data validate data/scenes."""
    from scinet.data import validate as validating
    from scinet.data.findings import ERROR, KINDS, WARNING

    with _terminal() as terminal:
        card, findings = validating.validate(directory, jobs=jobs or _cores(), progress=terminal.progress)
    found: list[dict[str, Any]] = [
        {"kind": kind, "level": level, "count": findings.counts[kind], "examples": findings.examples[kind]}
        for kind, (level, _) in KINDS.items()
        if kind in findings.counts
    ]
    num_errors, num_warnings = findings.total(ERROR), findings.total(WARNING)
    if json_:
        whole = {"directory": str(directory), "card_sha256": card.sha256, "errors": num_errors}
        print(json.dumps(whole | {"warnings": num_warnings, "findings": found}, indent=1))
    else:
        rows = [(one["level"], str(one["count"]), KINDS[one["kind"]][1], "; ".join(one["examples"])) for one in found]
        print(table(("level", "count", "finding", "first"), rows) if rows else "", end="")
        samples = sum(split.num_samples for split in card.splits.values())
        print(f"{directory}: {samples} samples, {num_errors} errors, {num_warnings} warnings")
    if num_errors:
        raise typer.Exit(1)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return rows as aligned columns; whole numbers are set to the right, what does not print is escaped."""
    lines = [[printable(str(cell)) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    is_number = [all(line[column].isdigit() for line in lines[1:]) for column in range(len(header))]
    shown = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "".join(f"{line}\n" for line in shown)


def printable(text: str) -> str:
    """Return a text that no terminal obeys: letters that do not print are escaped, and its end is cut."""
    safe = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return safe if len(safe) <= _WIDEST_CELL else safe[: _WIDEST_CELL - 1] + "…"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _terminal() -> Any:
    from scinet.telemetry import Terminal

    return Terminal()
