"""``scinet bench``: what fusion, reading and a whole step cost in time, memory and messages, beside their peers."""

from __future__ import annotations

import os
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from scinet.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Measure what a training costs on this machine, and plan it for others.")

_SMALLEST_ROWS = 256  # fewer leave pairs of columns without enough rows known in both
_LARGEST_SHARE = 0.5


class Operator(StrEnum):
    """What is compared."""

    propagate = "propagate"
    pearson = "pearson"
    all = "all"


class Device(StrEnum):
    """Where."""

    cpu = "cpu"
    cuda = "cuda"


OnDevice = Annotated[Device | None, typer.Option(help="Default: cuda if there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all.")]


@app.command()
def fusion(
    op: Annotated[Operator, typer.Option(help="The operator, or both.")] = Operator.all,
    sizes: Annotated[str, typer.Option(help="Rows, separated by commas; 1k = 1024.")] = "1k,4k",
    width: Annotated[int, typer.Option(min=1, help="Embedding width (propagate).")] = 512,
    columns: Annotated[int, typer.Option(min=2, help="Columns: classes.")] = 80,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each contestant; the fastest counts.")] = 7,
    threads: Threads = None,
    compile_: Annotated[bool, typer.Option("--compile/--no-compile", help="Let torch.compile compete.")] = False,
    memory: Annotated[bool, typer.Option(help="Measure memory: a process for each contestant, CPU only.")] = True,
    device: OnDevice = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the rows here too.")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="First choose this GPU's tiles, and remember them.")] = False,
) -> None:
    """Compare our operators with what a user would write: scinet bench fusion --sizes 1k --no-memory."""
    rows = _numbers("--sizes", sizes, _SMALLEST_ROWS)
    _check_folder(json_)

    from scinet_kernels import bench

    chosen = _device(device, threads, needs_gpu=tune)
    operators = [Operator.propagate, Operator.pearson] if op is Operator.all else [op]
    settings = [
        bench.Setting(one.value, size, width * (one is Operator.propagate), columns, repeats, has_backward, chosen)
        for one in operators
        for size in rows
        for has_backward in (False, True)[: 2 if one is Operator.propagate else 1]
    ]
    for setting in settings:
        _check_fits(bench.needed_bytes(setting), bench.available_bytes(chosen), setting.rows)
    if tune:
        _tune(rows[0], width, columns)
    found = bench.run(settings, with_compiled=compile_, with_memory=memory, say=_say)
    print(bench.report(found), end="")
    _write(json_, bench.to_json(found))


@app.command()
def step(
    config: Annotated[Path, typer.Option("--config", help="A YAML file, for example configs/quickstart.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each contestant; their median counts.")] = 9,
    steps: Annotated[int, typer.Option(min=2, help="Steps of the short runs on real data.")] = 10,
    threads: Threads = None,
    device: OnDevice = None,
) -> None:
    """Hold a training step against its bare encoder and open_clip: scinet bench step --config configs/quickstart.yaml.

    The image tower trains on images, whatever the configuration freezes or caches.
    """
    from scinet import config as configuration

    options = configuration.load(config, overrides or [])

    from scinet import stepbench

    print(stepbench.report(options, _device(device, threads), repeats, steps, _say), end="")


@app.command()
def share(
    config: Annotated[Path, typer.Option("--config", help="A YAML file, for example configs/quickstart.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
    batch: Annotated[int, typer.Option(min=2, help="G, samples of the global batch.")] = 4096,
    bank: Annotated[int, typer.Option(min=0, help="M, samples in the bank, which is full.")] = 65536,
    images: Annotated[int, typer.Option(min=1, help="Images a view on which the encoder is timed.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each part; the fastest counts.")] = 3,
    threads: Threads = None,
    device: OnDevice = None,
) -> None:
    """Print the fusion's share of a large step: scinet bench share --config configs/quickstart.yaml --batch 512."""
    from scinet import config as configuration

    options = configuration.load(config, overrides or [])

    from scinet import sharebench

    chosen = _device(device, threads)
    print(sharebench.report(options, sharebench.Sizes(batch, bank, images, repeats), chosen, _say), end="")


@app.command()
def memory(
    config: Annotated[Path, typer.Option("--config", help="A YAML file, for example configs/quickstart.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Training steps.")] = 3,
    threads: Threads = None,
) -> None:
    """Hold the estimate of a run's memory against the run: scinet bench memory --config configs/quickstart.yaml.

    Under torchrun (`torchrun --nproc-per-node 2 -m scinet.cli bench memory ...`) with as many ranks.
    """
    from scinet import config as configuration

    options = configuration.load(config, overrides or [])

    from scinet import memorybench

    _device(None, threads)
    _print_once(memorybench.report(options, steps, _say))


@app.command()
def zoo(
    samples: Annotated[int, typer.Option(min=1, help="N, of which tables are kept.")] = 10_000,
    classes: Annotated[int, typer.Option(min=2, help="C.")] = 9605,
    batch: Annotated[int, typer.Option(min=1, help="G, samples of the global batch.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each method.")] = 3,
    threads: Threads = None,
) -> None:
    """Print what each method keeps and holds at many classes: scinet bench zoo --classes 9605."""
    from scinet import zoobench

    _device(Device.cpu, threads)
    print(zoobench.report(zoobench.Setting(samples, classes, batch, steps), _say), end="")


@app.command()
def ranks(
    config: Annotated[Path, typer.Option("--config", help="A YAML file, for example configs/quickstart.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each ZeRO stage; their median counts.")] = 5,
    threads: Threads = None,
) -> None:
    """Hold the plan's step times against real ones: scinet bench ranks --config configs/quickstart.yaml --threads 1.

    Under torchrun (`torchrun --nproc-per-node 2 -m scinet.cli bench ranks ...`) with as many ranks.
    """
    from scinet import config as configuration

    options = configuration.load(config, overrides or [])

    from scinet import rankbench

    _device(None, threads)
    _print_once(rankbench.report(options, repeats, _say))


@app.command()
def scrape(
    config: Annotated[Path, typer.Option("--config", help="A YAML file, for example configs/quickstart.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
    ranks: Annotated[str, typer.Option(help="Ranks whose lines the text has, separated by commas.")] = "1,64",
    rate: Annotated[float, typer.Option(min=0.1, help="Scrapes a second.")] = 100.0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a turn.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Turns with a client, and without one.")] = 15,
    threads: Threads = None,
) -> None:
    """Measure what a scrape costs the training: scinet bench scrape --config configs/quickstart.yaml --threads 1."""
    from scinet import config as configuration

    options = configuration.load(config, overrides or [])
    numbers = _numbers("--ranks", ranks, 1)

    from scinet import scrapebench

    _device(None, threads)
    setting = scrapebench.Setting(repeats, steps, rate, tuple(numbers))
    print(scrapebench.report(options, setting, _say), end="")


@app.command()
def plan(
    config: Annotated[Path, typer.Option("--config", help="A YAML file, for example configs/coco2014.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
    batches: Annotated[str, typer.Option(help="G, samples of the global batch, separated by commas.")] = "4k,16k,64k",
    gpus: Annotated[str, typer.Option(help="Ranks, separated by commas.")] = "8,64,512",
    classes: Annotated[int | None, typer.Option(min=1, help="C; default: those of data.path.")] = None,
    micro_batch: Annotated[int, typer.Option(min=1, help="Most samples a rank takes at once.")] = 128,
    tflops: Annotated[float, typer.Option(min=1e-3, help="TFLOP/s that a rank achieves.")] = 200.0,
    gpus_per_host: Annotated[int, typer.Option(min=1, help="Ranks of a host.")] = 8,
    inside: Annotated[float, typer.Option("--inside-gb-s", min=1e-3, help="GB/s a rank within a host.")] = 200.0,
    between: Annotated[float, typer.Option("--between-gb-s", min=1e-3, help="GB/s a rank between hosts.")] = 25.0,
    latency: Annotated[float, typer.Option("--latency-us", min=0, help="Microseconds of a hop in the ring.")] = 10.0,
    device: Annotated[Device, typer.Option(help="What the ranks are: cuda trains in bf16.")] = Device.cuda,
) -> None:
    """Print what a step sends between ranks, and its time: scinet bench plan --config configs/quickstart.yaml."""
    from scinet import config as configuration

    options = configuration.load(config, overrides or [])
    rows, ranks = _numbers("--batches", batches, 1), _numbers("--gpus", gpus, 1)

    from scinet import traffic_report
    from scinet.traffic import Links

    subject = traffic_report.subject(options, classes, device.value)
    links = Links(gpus_per_host, inside * 1e9, between * 1e9, latency * 1e-6)
    scenario = traffic_report.Scenario(rows, ranks, micro_batch, tflops * 1e12, links)
    print(traffic_report.report(options, subject, scenario), end="")


@app.command()
def loader(
    data: Annotated[Path, typer.Option("--data", help="A folder made by scinet data build.")] = Path("data/scenes"),
    images: Annotated[int, typer.Option(min=1, help="Images a turn, filled up to whole shards.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a batch.")] = 64,
    workers: Annotated[int, typer.Option(min=0, max=64, help="Loader processes.")] = 0,
    image_size: Annotated[int, typer.Option(min=32, max=1024, help="Side of a view, pixels.")] = 224,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each contestant; the fastest counts.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; one, so that rates are per core.")] = 1,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the rows here too.")] = None,
) -> None:
    """Compare our reading path with its limit and its peers: scinet bench loader --images 256."""
    _check_folder(json_)
    from scinet.data import card as data_card

    card = data_card.read(data)

    from scinet import loaderbench

    _device(Device.cpu, threads)
    setting = loaderbench.Setting(images, batch, workers, image_size, repeats)
    rows, resume = loaderbench.measure(card, setting, _say)
    print(loaderbench.report(rows, resume, setting), end="")
    _write(json_, loaderbench.to_json(rows, resume, setting))


def _check_folder(path: Path | None) -> None:
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"--json {path}: the folder {path.parent} does not exist")


def _write(path: Path | None, text: str) -> None:
    if path is not None:
        temporary = path.with_name(f"{path.name}.part")
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(path)


def _print_once(text: str) -> None:
    """Print what all ranks have come to."""
    if os.environ.get("RANK", "0") == "0":
        print(text, end="")


def _numbers(option: str, text: str, smallest: int) -> list[int]:
    numbers = []
    for word in text.split(","):
        matched = re.fullmatch(r"(\d+)(k?)", word.strip())
        number = int(matched[1]) * (1024 if matched[2] else 1) if matched else 0
        if number < smallest:
            raise ConfigError(f"{option} has '{word.strip()}', expected whole numbers from {smallest}, such as 1k")
        numbers.append(number)
    return numbers


def _check_fits(needed: int, available: int, rows: int) -> None:
    if needed > _LARGEST_SHARE * available:
        raise ConfigError(
            f"--sizes has {rows}: that takes about {needed / 2**30:.0f} GiB, more than half of the "
            f"{available / 2**30:.0f} GiB there are; give fewer rows, or a smaller --width or --columns"
        )


def _device(wanted: Device | None, threads: int | None, *, needs_gpu: bool = False) -> str:
    import torch

    has_gpu = torch.cuda.is_available()
    if needs_gpu and (not has_gpu or wanted is Device.cpu):
        raise ConfigError("--tune chooses tiles of the GPU's kernels and needs a GPU: leave it out here")
    if wanted is Device.cuda and not has_gpu:
        raise ConfigError("--device cuda: there is no GPU here; use --device cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    return wanted.value if wanted else "cuda" if has_gpu else "cpu"


def _tune(rows: int, width: int, columns: int) -> None:
    import torch

    from scinet_kernels import tiles, tuning

    tuning.tune(rows, width, columns, torch.device("cuda"), _say)
    _say(f"tiles kept in {tiles.cache_path()}")


def _say(text: Any) -> None:
    print(text, file=sys.stderr, flush=True)
