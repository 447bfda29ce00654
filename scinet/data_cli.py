"""``scinet data build FORMAT``: one sub-command a source format."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from scinet.errors import ConfigError

if TYPE_CHECKING:  # heavy packages are imported inside the commands
    from scinet.data.card import DataCard
    from scinet.data.records import Collection

Collect = Callable[[Path, bool], "Collection"]
"""Returns a collection, given a folder for unpacked archives and whether to go on without a split that is missing."""

data_app = typer.Typer(no_args_is_help=True, help="Make and look at data sets.")
build_app = typer.Typer(no_args_is_help=True, help="Write a source as WebDataset shards with a data card.")
data_app.add_typer(build_app, name="build")


class Missing(StrEnum):
    """What to do about images that are missing or cannot be decoded."""

    stop = "stop"
    skip = "skip"


class Reencode(StrEnum):
    """What other formats are turned into."""

    jpeg = "jpeg"


class Difficulty(StrEnum):
    """How hard the scenes are to read."""

    easy = "easy"
    hard = "hard"


class Difficult(StrEnum):
    """What a VOC object marked difficult says."""

    ignore = "ignore"
    negative = "negative"
    positive = "positive"


class NusVersion(StrEnum):
    """The two published versions of NUS-WIDE."""

    cole = "cole"
    asl = "asl"


class Untagged(StrEnum):
    """What it means that a drawing lacks a tag."""

    absent = "absent"
    unknown = "unknown"


Source = Annotated[Path, typer.Option("--source", help="Folder with the official files, or with their archives.")]
DropEmpty = Annotated[
    bool, typer.Option("--drop-empty", help="Leave out images without any annotation, as published tables do.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder to make; must not hold anything yet.")]
Holdout = Annotated[
    float | None,
    typer.Option(help="Share of the training images set aside for model selection.", show_default="0.1"),
]
ShardSamples = Annotated[int, typer.Option(min=1, help="Images a shard.")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Processes that write shards.", show_default="the cores")]
MissingImages = Annotated[
    Missing, typer.Option("--missing", help="Images that are missing or broken: stop, or skip and list them.")
]
ReencodeTo = Annotated[
    Reencode | None,
    typer.Option(
        "--reencode", help="Turn formats other than JPEG, PNG and WEBP (kept as they are) into JPEG of quality 95."
    ),
]
Restart = Annotated[bool, typer.Option("--restart", help="Throw away what an unfinished build has left.")]


def _writing(
    out: Out,
    shard_samples: ShardSamples,
    holdout: Holdout = None,
    jobs: Jobs = None,
    missing: MissingImages = Missing.stop,
    reencode: ReencodeTo = None,
    restart: Restart = False,
) -> Callable[[Collect], None]:
    """Take the options that every format has, and return what writes a collection."""
    if holdout is not None:
        _check_share("--holdout", holdout)

    def write(collect: Collect) -> None:
        from scinet.data.building import BuildOptions, build
        from scinet.telemetry import Terminal

        skip = missing is Missing.skip
        options = BuildOptions(
            holdout=holdout,
            shard_samples=shard_samples,
            jobs=jobs or len(os.sched_getaffinity(0)),
            skip_missing=skip,
            reencode=reencode is not None,
            restart=restart,
        )
        with Terminal() as terminal:
            card = build(lambda scratch: collect(scratch, skip), out, options, terminal.progress)
            terminal.say(_described(card))

    return write


def _format(name: str, *, shard_samples: int) -> Callable[[Callable[..., Collect]], Callable[..., None]]:
    """Make a sub-command of a function that returns a collection; the options of all formats are put behind its own."""

    def decorate(function: Callable[..., Collect]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**given: Any) -> None:
            _writing(**{key: given.pop(key) for key in shared})(function(**given))

        own, shared = (_parameters(part) for part in (function, _writing))
        shared["shard_samples"] = shared["shard_samples"].replace(default=shard_samples)
        command.__signature__ = inspect.Signature(list((own | shared).values()))  # type: ignore[attr-defined]
        command.__annotations__ = {key: value.annotation for key, value in (own | shared).items()}
        del command.__wrapped__  # typer would look at the function instead
        build_app.command(name)(command)
        return command

    return decorate


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    hints = get_type_hints(function, include_extras=True, localns={"Collection": Any})
    found = inspect.signature(function).parameters
    return {
        key: value.replace(annotation=hints[key], kind=inspect.Parameter.KEYWORD_ONLY) for key, value in found.items()
    }


@_format("scenes", shard_samples=128)
def build_scenes(
    count: Annotated[int, typer.Option(min=10, help="Scenes in all.")] = 2000,
    test: Annotated[float, typer.Option(help="Share of the scenes in the test split.")] = 0.25,
    seed: Annotated[int, typer.Option(help="Decides everything.")] = 0,
    image_size: Annotated[int, typer.Option(help="Side of a scene, pixels.")] = 224,
    cooccurrence: Annotated[float, typer.Option(help="0 independent objects .. 1 strict contexts.")] = 0.8,
    difficulty: Annotated[Difficulty, typer.Option(help="Object size, background, occlusion.")] = Difficulty.easy,
) -> Collect:
    """Draw the embedded data set from OpenMoji: scinet data build scenes --out data/scenes."""
    from scinet.data.formats import scene_collection
    from scinet.data.formats.scenes import SceneOptions

    _check_share("--test", test)
    options = SceneOptions(count, seed, image_size, cooccurrence, difficulty.value)
    return lambda scratch, skip: scene_collection.collection(options, test_share=test)


@_format("csv", shard_samples=128)
def build_csv(
    labels: Annotated[Path, typer.Option(help="CSV: a file name, then one column a class, or a column of names.")],
    images: Annotated[Path, typer.Option(help="Folder of the images.")],
    name: Annotated[str, typer.Option(help="Name of the data set.", show_default="that of the folder")] = "",
    classes: Annotated[Path | None, typer.Option(help="Class names, one a line, that the columns must match.")] = None,
    list_column: Annotated[str | None, typer.Option(help="The column of names between ; or |.")] = None,
    separator: Annotated[
        str | None, typer.Option(help="What stands between the names of --list-column.", show_default="; or |")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="The code that means absent, where it is ambiguous.")] = None,
    unknown: Annotated[str | None, typer.Option(help="The code that means not annotated.")] = None,
    test: Annotated[int, typer.Option(help="Images of the test split, the last after shuffling.")] = 0,
    shuffle_seed: Annotated[int, typer.Option(help="Seed of the shuffling.")] = 0,
) -> Collect:
    """Read a label table: scinet data build csv --labels labels.csv --images DIR --out DIR.

    With --list-column, "unlisted" is the code of a class that a row does not name: --negative unlisted, or --unknown
    unlisted.
    """
    from scinet.data.formats import table
    from scinet.data.formats.table_rows import TableOptions

    options = TableOptions(labels, images, classes, negative, unknown, test, shuffle_seed, list_column, separator)
    return lambda scratch, skip: table.collection(options, name)


@_format("jsonl", shard_samples=128)
def build_jsonl(
    labels: Annotated[Path, typer.Option(help='JSONL: {"file": ..., "positives": [names], "negatives": [names]}.')],
    images: Annotated[Path, typer.Option(help="Folder of the images.")],
    name: Annotated[str, typer.Option(help="Name of the data set.", show_default="that of the folder")] = "",
    classes: Annotated[Path | None, typer.Option(help="Class names, one a line.")] = None,
    test: Annotated[int, typer.Option(help="Images of the test split, the last after shuffling.")] = 0,
    shuffle_seed: Annotated[int, typer.Option(help="Seed of the shuffling.")] = 0,
) -> Collect:
    """Read labels as lists of names: scinet data build jsonl --labels labels.jsonl --images DIR --out DIR."""
    from scinet.data.formats import table
    from scinet.data.formats.table_rows import TableOptions

    options = TableOptions(labels, images, classes, None, None, test, shuffle_seed, is_jsonl=True)
    return lambda scratch, skip: table.collection(options, name)


@_format("voc2007", shard_samples=256)
def build_voc2007(
    source: Source,
    difficult: Annotated[Difficult, typer.Option(help="Objects marked difficult.")] = Difficult.ignore,
) -> Collect:
    """Read VOC2007, trainval and test: scinet data build voc2007 --source DIR --out data/voc2007."""
    from scinet.data.formats import voc

    return functools.partial(voc.collection, voc.VocOptions(source, 2007, difficult.value))


@_format("voc2012", shard_samples=256)
def build_voc2012(
    source: Source,
    difficult: Annotated[Difficult, typer.Option(help="Objects marked difficult.")] = Difficult.ignore,
) -> Collect:
    """Read VOC2012, train and val: scinet data build voc2012 --source DIR --out data/voc2012."""
    from scinet.data.formats import voc

    return functools.partial(voc.collection, voc.VocOptions(source, 2012, difficult.value))


@_format("coco2014", shard_samples=256)
def build_coco2014(source: Source, drop_empty: DropEmpty = False) -> Collect:
    """Read COCO 2014, train and val: scinet data build coco2014 --source DIR --out data/coco2014."""
    from scinet.data.formats import coco

    return functools.partial(coco.collection, coco.CocoOptions(source, 2014, drop_empty))


@_format("coco2017", shard_samples=256)
def build_coco2017(source: Source, drop_empty: DropEmpty = False) -> Collect:
    """Read COCO 2017, train and val: scinet data build coco2017 --source DIR --out data/coco2017."""
    from scinet.data.formats import coco

    return functools.partial(coco.collection, coco.CocoOptions(source, 2017, drop_empty))


@_format("nuswide", shard_samples=256)
def build_nuswide(
    source: Source,
    version: Annotated[
        NusVersion,
        typer.Option(help="cole keeps rows without a concept (150,000/60,260); asl drops them (119,103/50,720)."),
    ],
) -> Collect:
    """Read NUS-WIDE: scinet data build nuswide --source DIR --version asl --out data/nuswide."""
    from scinet.data.formats import nuswide

    return functools.partial(nuswide.collection, nuswide.NusWideOptions(source, version.value))


@_format("cub", shard_samples=256)
def build_cub(
    source: Source,
    certainty: Annotated[
        list[int] | None,
        typer.Option(
            help="Labels of this certainty (1 not visible, 2 guessing, 3 probably, 4 definitely) count as not "
            "annotated; may be repeated.",
            show_default="every label counts, as in the published tables",
        ),
    ] = None,
) -> Collect:
    """Read CUB-200-2011 attributes: scinet data build cub --source DIR --out data/cub."""
    from scinet.data.formats import cub

    return functools.partial(cub.collection, cub.CubOptions(source, tuple(sorted(set(certainty or [])))))


@_format("openimages", shard_samples=4096)
def build_openimages(source: Source) -> Collect:
    """Read Open Images V6: scinet data build openimages --source DIR --out data/openimages."""
    from scinet.data.formats import openimages

    return functools.partial(openimages.collection, openimages.OpenImagesOptions(source))


@_format("openclipart", shard_samples=128)
def build_openclipart(
    source: Annotated[
        Path | None,
        typer.Option(
            help="Folder with Debian's openclipart-png and openclipart-svg, as .deb or unpacked (apt-get download).",
            show_default=False,
        ),
    ] = None,
    untagged: Annotated[
        Untagged,
        typer.Option(help="A concept without its tag: absent, so that mAP means something; unknown, as it happens."),
    ] = Untagged.absent,
) -> Collect:
    """Read Debian's tagged drawings: scinet data build openclipart --source openclipart --out data/drawings.

    3,764 drawings of 49 concepts by free tags, really incomplete; `apt-get download openclipart-png openclipart-svg`
    gets them. Variants of a drawing share a split; --holdout would part them.
    """
    from scinet.data.formats import openclipart

    return functools.partial(openclipart.collection, openclipart.OpenClipartOptions(source, untagged.value))


def _check_share(option: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{option} is {value}, expected a share from 0 up to 1")


def _described(card: DataCard) -> str:
    counts = ", ".join(f"{name} {split.num_samples}" for name, split in card.splits.items())
    positives = sum(sum(split.num_positives) for split in card.splits.values())
    labelled = positives + sum(sum(split.num_negatives) for split in card.splits.values())
    without = f"; {card.missing.count} were left out: {card.missing.file} lists them" if card.missing.count else ""
    return (
        f"{card.directory}: {card.num_classes} classes; {counts} images; "
        f"{positives / max(labelled, 1):.1%} of the labels are positive{without}"
    )
