"""The ``scinet`` command: ``data build``, ``train``, ``evaluate``, ``predict``, ``compare``, ``bench``.

Heavy packages are imported inside the commands, so that help and usage errors come at once.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from scinet import bench_cli, data_tools_cli
from scinet.errors import ConfigError, ScinetError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
data_app = typer.Typer(no_args_is_help=True, help="Make and look at data sets.")
build_app = typer.Typer(no_args_is_help=True, help="Write a source as WebDataset shards with a data card.")
app.add_typer(data_app, name="data")
data_app.add_typer(build_app, name="build")
data_tools_cli.register(data_app)
app.add_typer(bench_cli.app, name="bench")

Out = Annotated[Path, typer.Option("--out", help="Folder to make; must not hold anything yet.")]
Holdout = Annotated[float, typer.Option(help="Share of the training images set aside for model selection.")]
ShardSamples = Annotated[int, typer.Option(min=1, help="Images a shard.")]


class Difficulty(StrEnum):
    """How hard the scenes are to read."""

    easy = "easy"
    hard = "hard"


@app.callback()
def _about() -> None:
    """SCINet: partial multi-label learning. A first run: `make quickstart`."""


@build_app.command("scenes")
def build_scenes(
    out: Out,
    count: Annotated[int, typer.Option(min=10, help="Scenes in all.")] = 2000,
    test: Annotated[float, typer.Option(help="Share of the scenes in the test split.")] = 0.25,
    seed: Annotated[int, typer.Option(help="Decides everything.")] = 0,
    image_size: Annotated[int, typer.Option(help="Side of a scene, pixels.")] = 224,
    cooccurrence: Annotated[float, typer.Option(help="0 independent objects .. 1 strict contexts.")] = 0.8,
    difficulty: Annotated[Difficulty, typer.Option(help="Object size, background, occlusion.")] = Difficulty.easy,
    holdout: Holdout = 0.1,
    shard_samples: ShardSamples = 128,
) -> None:
    """Draw the embedded data set from OpenMoji: scinet data build scenes --out data/scenes."""
    from scinet.data.building import build_scenes as build
    from scinet.data.formats.scenes import SceneOptions

    options = SceneOptions(
        count=count,
        seed=seed,
        image_size=image_size,
        cooccurrence=cooccurrence,
        difficulty=difficulty.value,
    )
    _check_share("--test", test)
    _check_share("--holdout", holdout)
    with _terminal() as terminal:
        card = build(
            options, out, test_share=test, holdout=holdout, shard_samples=shard_samples, progress=terminal.progress
        )
        terminal.say(_described(card))


@build_app.command("csv")
def build_csv(
    labels: Annotated[Path, typer.Option(help="CSV: a file name, then one column a class.")],
    images: Annotated[Path, typer.Option(help="Folder of the images.")],
    out: Out,
    name: Annotated[str | None, typer.Option(help="Name of the data set; default: that of the folder.")] = None,
    classes: Annotated[Path | None, typer.Option(help="Class names, one a line, that the columns must match.")] = None,
    negative: Annotated[str | None, typer.Option(help="The code that means absent, where it is ambiguous.")] = None,
    unknown: Annotated[str | None, typer.Option(help="The code that means not annotated.")] = None,
    test: Annotated[int, typer.Option(help="Images of the test split, the last after shuffling.")] = 0,
    shuffle_seed: Annotated[int, typer.Option(help="Seed of the shuffling.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out images that are missing or broken.")] = False,
    holdout: Holdout = 0.1,
    shard_samples: ShardSamples = 128,
) -> None:
    """Read a label table: scinet data build csv --labels labels.csv --images DIR --out DIR."""
    _build_table(
        labels, images, out, name, classes, negative, unknown, test, shuffle_seed, skip_bad, holdout, shard_samples
    )


@build_app.command("jsonl")
def build_jsonl(
    labels: Annotated[Path, typer.Option(help='JSONL: {"file": ..., "positives": [names], "negatives": [names]}.')],
    images: Annotated[Path, typer.Option(help="Folder of the images.")],
    out: Out,
    name: Annotated[str | None, typer.Option(help="Name of the data set; default: that of the folder.")] = None,
    classes: Annotated[Path | None, typer.Option(help="Class names, one a line.")] = None,
    test: Annotated[int, typer.Option(help="Images of the test split, the last after shuffling.")] = 0,
    shuffle_seed: Annotated[int, typer.Option(help="Seed of the shuffling.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out images that are missing or broken.")] = False,
    holdout: Holdout = 0.1,
    shard_samples: ShardSamples = 128,
) -> None:
    """Read labels as lists of names: scinet data build jsonl --labels labels.jsonl --images DIR --out DIR."""
    _build_table(labels, images, out, name, classes, None, None, test, shuffle_seed, skip_bad, holdout, shard_samples)


def _build_table(
    labels: Path,
    images: Path,
    out: Path,
    name: str | None,
    classes: Path | None,
    negative: str | None,
    unknown: str | None,
    test: int,
    shuffle_seed: int,
    skip_bad: bool,
    holdout: float,
    shard_samples: int,
) -> None:
    from scinet.data.building import build_table
    from scinet.data.formats.table import TableOptions

    _check_share("--holdout", holdout)
    options = TableOptions(labels, images, classes, negative, unknown, test, shuffle_seed, skip_bad)
    with _terminal() as terminal:
        card = build_table(
            options,
            out,
            name=name or out.name,
            holdout=holdout,
            shard_samples=shard_samples,
            progress=terminal.progress,
        )
        terminal.say(_described(card))


@app.command(context_settings={"ignore_unknown_options": False})
def train(
    config: Annotated[Path | None, typer.Option("--config", help="A YAML file; without it the defaults hold.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
) -> None:
    """Train on one rank; for more: deepspeed --num_gpus 2 scinet/train.py --config FILE."""
    from scinet import config as configuration
    from scinet import running

    running.run(configuration.load(config, overrides or []))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Option("--run", help="A run directory.")],
    data: Annotated[str, typer.Option("--data", help="Other shards with the same classes, a folder or URL.")] = "",
    split: Annotated[str, typer.Option(help="train, holdout or test.")] = "test",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate a run's selected weights: scinet evaluate --run runs/quickstart."""
    from scinet import serving

    serving.print_evaluation(run, data, split, as_json=json_)


@app.command()
def predict(
    run: Annotated[Path, typer.Option("--run", help="A run directory.")],
    paths: Annotated[list[Path], typer.Argument(metavar="IMAGE|FOLDER...")],
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object an image.")] = False,
    csv_: Annotated[bool, typer.Option("--csv", help="Print CSV, one row an image, one column a class.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Classes shown an image.")] = 5,
) -> None:
    """Label images that were never seen: scinet predict --run runs/quickstart photo.jpg."""
    from scinet import serving

    if json_ and csv_:
        raise ConfigError("--json and --csv exclude each other")
    style = "json" if json_ else "csv" if csv_ else "text"
    if serving.print_predictions(run, paths, style=style, top=top):
        raise typer.Exit(1)


@app.command()
def show(run: Annotated[Path, typer.Option("--run", help="A finished run's directory.")]) -> None:
    """Print a finished run's result, and where its page is: scinet show --run runs/quickstart."""
    from scinet import rundir
    from scinet.report import summary

    directory, options = rundir.find(run)
    for what, value in summary.headline(options, rundir.read_evaluation(directory)):
        print(f"{value:>6}  {what}")
    print(f"page: {directory.path / 'report.html'}")


@app.command()
def compare(
    config: Annotated[Path, typer.Option("--config", help="A file of configs/compare.")],
    seeds: Annotated[str | None, typer.Option(help="Seeds instead of the file's, for example 3,4,5.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells run at once, one thread each.")] = 1,
) -> None:
    """Run methods x known ratios x seeds under one protocol and print the table."""
    from scinet.evaluation import compare as comparing

    with _terminal() as terminal:
        comparing.compare(config, [int(seed) for seed in seeds.split(",")] if seeds else None, jobs, terminal)


def _check_share(option: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{option} is {value}, expected a share from 0 up to 1")


def _terminal() -> Any:
    from scinet.telemetry import Terminal

    return Terminal()


def _described(card: Any) -> str:
    counts = ", ".join(f"{name} {split.num_samples}" for name, split in card.splits.items())
    density = card.splits["train"].label_density if "train" in card.splits else 0.0
    return f"{card.directory}: {card.num_classes} classes; {counts} images; {density:.1%} of the labels are positive"


def main() -> int:
    """Run the command and return its exit status: 0 done, 1 failed, 2 wrong usage."""
    try:
        status = app(standalone_mode=False)
        return status if isinstance(status, int) else 0
    except ScinetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except typer.Abort:
        return 130
    except Exception as error:
        # typer's usage errors know how to show themselves and carry exit status 2
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            return int(error.exit_code)
        raise


if __name__ == "__main__":
    sys.exit(main())
