"""The ``scinet`` command: ``data build``, ``train``, ``evaluate``, ``predict``, ``top``, ``compare``, ``bench``.

Heavy packages are imported inside the commands, so that help and usage errors come at once.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from scinet import bench_cli, data_cli, data_tools_cli
from scinet.errors import ConfigError, ScinetError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(data_cli.data_app, name="data")
data_tools_cli.register(data_cli.data_app)
app.add_typer(bench_cli.app, name="bench")


@app.callback()
def _about() -> None:
    """SCINet: partial multi-label learning. A first run: `make quickstart`."""


@app.command(context_settings={"ignore_unknown_options": False})
def train(
    config: Annotated[Path | None, typer.Option("--config", help="A YAML file; without it the defaults hold.")] = None,
    resume: Annotated[str, typer.Option(help="auto: go on with the run, or begin it; never: refuse one.")] = "",
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
) -> None:
    """Train on one rank; for more: deepspeed --num_gpus 2 scinet/train.py --config FILE."""
    from scinet import train as training

    words = [] if config is None else ["--config", str(config)]
    words += ["--resume", resume] if resume else []
    raise typer.Exit(training.main([*words, *(overrides or [])]))


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
    fused: Annotated[bool, typer.Option("--fused", help="Let the bank of labelled images have a say.")] = False,
    known: Annotated[
        Path | None,
        typer.Option("--known", help="CSV of known labels: a file name, then 1, 0 or blank a class; with --fused."),
    ] = None,
    why: Annotated[int, typer.Option(min=0, help="Name so many of the nearest labelled images; with --fused.")] = 0,
) -> None:
    """Label images that were never seen: scinet predict --run runs/quickstart photo.jpg."""
    from scinet import serving

    if json_ and csv_:
        raise ConfigError("--json and --csv exclude each other")
    if (known or why) and not fused:
        raise ConfigError(f"{'--known' if known else '--why'} needs --fused: it is about the bank")
    if why and csv_:
        raise ConfigError("--why and --csv exclude each other: a table has no place for reasons")
    style = "json" if json_ else "csv" if csv_ else "text"
    wanted = serving.Wanted(style, top, is_fused=fused, known=known, why=why)
    if serving.print_predictions(run, paths, wanted):
        raise typer.Exit(1)


@app.command()
def complete(
    run: Annotated[Path, typer.Option("--run", help="A run directory.")],
    out: Annotated[Path, typer.Option("--out", help="CSV file, a row a cell.")],
    data: Annotated[str, typer.Option("--data", help="Other shards with the same classes, a folder or URL.")] = "",
) -> None:
    """Complete the labels of the training images: scinet complete --run runs/quickstart --out labels.csv."""
    from scinet import completing

    completing.complete(run, out, data)


@app.command()
def show(run: Annotated[Path, typer.Option("--run", help="A finished run's directory.")]) -> None:
    """Print a finished run's result, and where its page is: scinet show --run runs/quickstart."""
    from scinet import rundir
    from scinet.report import summary

    directory, options = rundir.find(run)
    for what, value in summary.headline(options, rundir.read_evaluation(directory)):
        print(f"{value:>6}  {what}")
    page = directory.path / "report.html"
    print(f"page: {page}" if page.is_file() else "no page: the test split was not opened (train.test_at_end=false)")


@app.command()
def top(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="[RUN]...", help="Run directories.")] = None,
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
) -> None:
    """Watch runs, all of runs/ unless named; q ends it: scinet top runs/quickstart."""
    from scinet.top import command

    command.top(runs or [], folder=Path("runs"), interval_s=interval, once=once)


@app.command()
def compare(
    config: Annotated[Path, typer.Option("--config", help="A file of configs/compare.")],
    seeds: Annotated[str | None, typer.Option(help="Seeds instead of the file's, for example 3,4,5.")] = None,
    methods: Annotated[str | None, typer.Option(help="Only these methods of the file, for example scinet,bce.")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cells trained at once, one thread each; on GPUs each sees one. The results do not depend on it.",
            show_default="the GPUs, or else the cores",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells, done or not, and train nothing.")] = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Make the tables from the kept predictions alone, and train nothing.")
    ] = False,
) -> None:
    """Compare methods over known ratios, settings and seeds under one protocol.

    Prints the tables and writes comparison.json, .csv, .md and .html into the file's output folder. A finished cell is
    kept with its test predictions: an interrupted command goes on, and two at once share the work.

    scinet compare --config configs/compare/scenes-zoo.yaml --methods scinet,bce,epr
    """
    from scinet.evaluation.comparison import command

    if dry_run and recompute:
        raise ConfigError("--dry-run and --recompute exclude each other")
    wanted = command.read(config, seeds=_whole_numbers("--seeds", seeds), methods=methods)
    if dry_run:
        print(command.list_cells(wanted), end="")
        return
    with _terminal() as terminal:
        if recompute:
            command.recompute(wanted, jobs, terminal)
        else:
            command.compare(wanted, jobs, terminal)


def _whole_numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    if not all(word.strip().isdecimal() for word in text.split(",")):
        raise ConfigError(f"{option} is '{text}', expected whole numbers such as 3,4,5")
    return [int(word) for word in text.split(",")]


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def soak(context: typer.Context) -> None:
    """Break a run at random, go on, and compare with the unbroken one: scinet soak --kills 20 --config FILE."""
    # the cluster package stands above this one
    raise typer.Exit(importlib.import_module("scinet_cluster.soak").main(context.args))


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def sweep(context: typer.Context) -> None:
    """Search options by the hold-out: scinet sweep --config configs/sweeps/loss_weights.yaml."""
    raise typer.Exit(importlib.import_module("scinet_cluster.sweep").main(context.args))


def _terminal() -> Any:
    from scinet.telemetry import Terminal

    return Terminal()


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
