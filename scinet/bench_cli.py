"""``scinet bench``: how fast the fusion is, alone and within a training step, and how fast data are read."""

from __future__ import annotations

import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from scinet.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Measure fusion and reading on this machine.")

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
    rows = _rows(sizes)
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
    batch: Annotated[int, typer.Option(min=2, help="G, samples of the global batch.")] = 4096,
    bank: Annotated[int, typer.Option(min=0, help="M, samples in the bank, which is full.")] = 65536,
    images: Annotated[int, typer.Option(min=1, help="Images a view on which the encoder is timed.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each part; the fastest counts.")] = 3,
    threads: Threads = None,
    device: OnDevice = None,
) -> None:
    """Print the fusion's share of a training step: scinet bench step --config configs/quickstart.yaml --batch 512."""
    from scinet import config as configuration

    options = configuration.load(config, overrides or [])

    from scinet import stepbench

    chosen = _device(device, threads)
    print(stepbench.report(options, stepbench.Sizes(batch, bank, images, repeats), chosen, _say), end="")


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


def _rows(sizes: str) -> list[int]:
    rows = []
    for word in sizes.split(","):
        matched = re.fullmatch(r"(\d+)(k?)", word.strip())
        size = int(matched[1]) * (1024 if matched[2] else 1) if matched else 0
        if size < _SMALLEST_ROWS:
            raise ConfigError(f"--sizes has '{word.strip()}', expected whole numbers from {_SMALLEST_ROWS}, such as 1k")
        rows.append(size)
    return rows


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
