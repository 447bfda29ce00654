"""``scinet data validate``, ``inspect``, ``mask`` and ``estimate``: look at a data set before training on it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from scinet.errors import ConfigError
from scinet.texttable import table

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder made by scinet data build.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(data_app: typer.Typer) -> None:
    """Add the commands to ``scinet data``."""
    data_app.command("validate")(validate)
    data_app.command("inspect")(inspect)
    data_app.command("mask")(mask)
    data_app.command("estimate")(estimate)


def validate(
    directory: Folder,
    json_: AsJson = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, max=256, help="Processes that read shards.", show_default="the cores")
    ] = None,
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
        print(f"{directory}: {card.num_samples} samples, {num_errors} errors, {num_warnings} warnings")
    if num_errors:
        raise typer.Exit(1)


def inspect(
    directory: Folder,
    out: Annotated[Path | None, typer.Option("--out", help="Write a page here, for example page.html.")] = None,
    samples: Annotated[int, typer.Option(min=0, max=1000, help="Images on the page.")] = 24,
) -> None:
    """Show what a data set holds, and write a page about it: scinet data inspect data/scenes --out page.html."""
    from scinet import inspecting

    with _terminal() as terminal:
        card = inspecting.load(directory)
        print(inspecting.report(card), end="")
        if out is not None:
            inspecting.write_page(card, out, samples, terminal.progress)
            print(f"page: {out}")


def mask(
    directory: Folder,
    known_ratio: Annotated[float | None, typer.Option(min=0, max=1, help="Share of the cells that stay known.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the mask, as data.mask_seed.")] = 0,
    single_positive: Annotated[bool, typer.Option("--single-positive", help="One positive an image.")] = False,
    class_ratio_spread: Annotated[float, typer.Option(min=0, max=1, help="As data.class_ratio_spread.")] = 0.0,
    annotated_classes: Annotated[float, typer.Option(min=0.001, max=1, help="As data.annotated_classes.")] = 1.0,
    flipped_labels: Annotated[float, typer.Option(min=0, max=1, help="As data.flipped_labels.")] = 0.0,
    split: Annotated[str, typer.Option(help="train, holdout or test.")] = "train",
    out: Annotated[Path | None, typer.Option("--out", help="Write the mask here, for data.mask_file.")] = None,
    from_: Annotated[Path | None, typer.Option("--from", help="Read a published mask: JSONL, or CSV.")] = None,
    negative: Annotated[str | None, typer.Option(help="CSV: the code that means known to be absent.")] = None,
    unknown: Annotated[str | None, typer.Option(help="CSV: the code that means not known.")] = None,
    json_: AsJson = False,
) -> None:
    """Show what a mask leaves known, class by class: scinet data mask data/scenes --known-ratio 0.1 --seed 0."""
    from scinet import config as configuration
    from scinet import masktool
    from scinet.options import Options

    if from_ is None and (known_ratio is None) != single_positive:
        raise ConfigError("give one of --known-ratio, --single-positive and --from FILE")
    if from_ is not None and (single_positive or class_ratio_spread or annotated_classes < 1 or flipped_labels):
        raise ConfigError(
            "--from reads a mask; --single-positive, --class-ratio-spread, --annotated-classes and --flipped-labels "
            "draw one: give one or the other"
        )
    if from_ is None and (negative or unknown):
        raise ConfigError("--negative and --unknown explain the codes of --from FILE, which is not given")
    if flipped_labels and out is not None:
        raise ConfigError("--out would write labels that contradict the shards: train with data.flipped_labels instead")
    drawn = configuration.replace(
        Options(),
        data__known_ratio=known_ratio or 0.0,
        data__mask_seed=seed,
        data__single_positive=single_positive,
        data__class_ratio_spread=class_ratio_spread,
        data__annotated_classes=annotated_classes,
        data__flipped_labels=flipped_labels,
    ).data
    asked = masktool.Asked(directory, split, known_ratio, drawn, from_, negative, unknown, out)
    with _terminal() as terminal:
        result = masktool.look(asked, terminal.progress)
    print(json.dumps(result.to_json(), indent=1) + "\n" if json_ else masktool.report(result), end="")
    if not result.fits:
        raise typer.Exit(1)


def estimate(
    samples: Annotated[int | None, typer.Option(min=1, help="N, images in all.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="C.")] = None,
    positives: Annotated[float, typer.Option("--positives-per-image", min=0, help="Known positives.")] = 3.0,
    negatives: Annotated[
        float | None,
        typer.Option("--negatives-per-image", min=0, help="Known negatives.", show_default="all other classes"),
    ] = None,
    image_bytes: Annotated[int, typer.Option("--bytes-per-image", min=1, help="Size of an encoded image.")] = 110_000,
    shard_samples: Annotated[int, typer.Option(min=1, help="Images a shard.")] = 128,
    global_batch_size: Annotated[int | None, typer.Option(min=1, help="G over all ranks.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="R, processes that train.")] = 1,
    bank_size: Annotated[int | None, typer.Option(min=0, help="M, rows of the bank.")] = None,
    width: Annotated[
        int | None, typer.Option("--backbone-width", min=1, help="D; default: 512, or that of --config.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A YAML file; its data.path, where built.")] = None,
) -> None:
    """Print what a data set and its training take: scinet data estimate --samples 100000 --classes 80."""
    from scinet import config as configuration
    from scinet import estimating

    options = configuration.load(config)
    changes: dict[str, Any] = {"train__global_batch_size": global_batch_size, "fusion__bank_size": bank_size}
    options = configuration.replace(options, **{key: value for key, value in changes.items() if value is not None})
    if samples is not None and classes is not None:
        unlisted = max(0.0, classes - positives) if negatives is None else negatives
        data = estimating.DataSize(samples, classes, positives, unlisted, image_bytes, shard_samples)
    elif samples is None and classes is None and config is not None:
        from scinet.data import card as data_card

        data = estimating.of_card(data_card.read(Path(options.data.path), prepare=options.data.prepare))
    else:
        raise ConfigError("give --samples and --classes, or --config FILE whose data.path is built")
    if config is None:
        print(estimating.report(data, options, width or 512, ranks))
        print("Not in it: towers, gradients, optimiser, activations (give --config), Python and torch themselves.")
        return
    from scinet import fitting

    print(fitting.planned(data, options, width, ranks), end="")


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _terminal() -> Any:
    from scinet.telemetry import Terminal

    return Terminal()
