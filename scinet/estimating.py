"""``scinet data estimate``: what disk and memory a data set and its training would take, before anything is built.

The card is written by the writer of cards, and scaled; the sizes of the training state are written down here, and held
against the tensors of its own classes by a test.

Shapes: N samples, C classes, G global batch, M bank rows, D embedding.
"""

from __future__ import annotations

import json
import math
import tarfile
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from scinet.assembling import num_regions
from scinet.data import card as data_card
from scinet.data.card import DataCard, Missing, Shard, Split
from scinet.data.cooccurrence import ALL_PAIRS_UP_TO, LARGEST_PAIRS, Cooccurrence
from scinet.data.loading import num_waiting
from scinet.data.share import share_of
from scinet.errors import ConfigError, DataError
from scinet.fusion.evidence import MOST_CLASSES
from scinet.options import Combine, Memory, Method, Options, Profile, Weights
from scinet.texttable import size, table
from scinet.zoo.catalogue import table_bytes

_ID_LENGTH = 16
# a sample in the window: its dict, its keys and the headers of its bytes objects, as tracemalloc counts them
_SAMPLE_OVERHEAD = 700
_FLOAT, _DOUBLE, _INDEX = 4, 8, 8
_PLACE = 2 * _INDEX  # where a ring is written next, and how far it is filled


@dataclass(frozen=True)
class DataSize:
    """A data set that is or would be; of its samples some are trained on, and at most ``num_scored`` scored at once.

    Where the splits are not known, 0 stands for them, and all samples count as trained on.
    """

    num_samples: int
    num_classes: int
    positives_an_image: float
    negatives_an_image: float
    image_bytes: float
    shard_samples: int
    num_trained: int = 0
    num_scored: int = 0

    def __post_init__(self) -> None:
        """Check that an image has no more labels than classes.

        Raises:
            ConfigError: if it has.
        """
        labels = self.positives_an_image + self.negatives_an_image
        if labels > self.num_classes:
            raise ConfigError(
                f"{labels:g} known labels an image (--positives-per-image {self.positives_an_image:g}, "
                f"--negatives-per-image {self.negatives_an_image:g}) are more than --classes {self.num_classes}"
            )


@dataclass(frozen=True)
class Need:
    """One line of the estimate.

    ``remedy`` names the options that would make it smaller, ``is_saved`` says whether a checkpoint holds it.
    """

    what: str
    num_bytes: float
    remedy: str = ""
    is_refused: bool = False
    is_saved: bool = True


def of_card(card: DataCard) -> DataSize:
    """Return the sizes of a data set that is there."""
    splits = list(card.splits.values())
    num_samples = card.num_samples
    if not num_samples:
        raise DataError(f"{card.where} lists no sample")
    positives, negatives = (sum(sum(getattr(s, key)) for s in splits) for key in ("num_positives", "num_negatives"))
    num_shards = sum(len(split.shards) for split in splits)
    known = DataSize(
        num_samples=num_samples,
        num_classes=card.num_classes,
        positives_an_image=positives / num_samples,
        negatives_an_image=negatives / num_samples,
        image_bytes=0,
        shard_samples=-(-num_samples // num_shards),
        num_trained=card.splits["train"].num_samples if "train" in card.splits else 0,
        num_scored=max((s.num_samples for name, s in card.splits.items() if name != "train"), default=0),
    )
    stored = sum(shard.num_bytes for split in splits for shard in split.shards) / num_samples
    return replace(known, image_bytes=max(1.0, stored - _shards(known).num_bytes / num_samples))


def disk(data: DataSize) -> list[Need]:
    """Return what ``scinet data build`` would write."""
    num_shards = -(-data.num_samples // data.shard_samples)
    card = Need("data card", card_bytes(data, num_shards), "more images a shard (--shard-samples)")
    return [_shards(data), card]


def _shards(data: DataSize) -> Need:
    labels = label_bytes(data)
    # a header each; contents are filled up to whole blocks, images of many sizes by half a block on average
    sample = 2 * tarfile.BLOCKSIZE + data.image_bytes + tarfile.BLOCKSIZE / 2 + _blocks(labels)
    num_shards = -(-data.num_samples // data.shard_samples)
    # two blocks of zeros end a tar, which is filled up to a record
    ends = num_shards * (2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE / 2)
    return Need(
        f"{num_shards:,} shards: images {size(data.num_samples * data.image_bytes)}, labels "
        f"{size(data.num_samples * labels)}, the rest is tar",
        data.num_samples * sample + ends,
    )


def _blocks(num_bytes: int) -> int:
    return -(-num_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def label_bytes(data: DataSize) -> int:
    """Return the length of a typical sample's json: class indices spread evenly."""
    num_positives, num_negatives = round(data.positives_an_image), round(data.negatives_an_image)
    known = num_positives + num_negatives
    spread = [number * data.num_classes // max(known, 1) for number in range(known)]
    step = max(1, known // max(num_positives, 1))
    positives = spread[::step][:num_positives]
    negatives = [label for label in spread if label not in set(positives)]
    labels = {"id": "x" * _ID_LENGTH, "index": data.num_samples, "positives": positives, "negatives": negatives}
    return len(json.dumps(labels))


def card_bytes(data: DataSize, num_shards: int) -> float:
    """Return the size of the data card: a small one is written, and its shard list scaled."""

    def written(shards: int) -> int:
        shard = Shard("train-000000.tar", data.shard_samples, int(data.shard_samples * data.image_bytes), "0" * 64)
        counts = (data.num_samples,) * data.num_classes
        split = Split(data.num_samples, counts, counts, (shard,) * shards, _pairs(data))
        with tempfile.TemporaryDirectory() as folder:
            names = [f"class name {c:05d}" for c in range(data.num_classes)]
            data_card.write(
                Path(folder),
                name="data",
                class_names=names,
                splits={"train": split},
                source={},
                num_indices=data.num_samples,
                missing=Missing(),
            )
            return (Path(folder) / data_card.CARD_NAME).stat().st_size

    return written(0) + num_shards * (written(2) - written(1))


def _pairs(data: DataSize) -> Cooccurrence:
    """Return as many pairs of classes as positives spread evenly would make, or as the card keeps."""
    possible = data.num_classes * (data.num_classes - 1) / 2
    drawn = data.num_samples * data.positives_an_image * max(data.positives_an_image - 1, 0) / 2
    num_pairs = round(possible * -math.expm1(-drawn / possible)) if possible else 0
    if data.num_classes > ALL_PAIRS_UP_TO:
        num_pairs = min(num_pairs, LARGEST_PAIRS)
    labels = tuple(number * data.num_classes // num_pairs for number in range(num_pairs))
    return Cooccurrence(labels, labels, (round(drawn / max(num_pairs, 1)),) * num_pairs, num_pairs)


def reading(data: DataSize, options: Options, ranks: int) -> list[Need]:
    """Return the host memory of one rank's stream: shuffle windows, samples that wait, batches."""
    workers = max(1, options.data.workers)
    lanes = options.data.lanes
    open_lanes = workers * (lanes // math.gcd(lanes, ranks * workers))
    window = min(options.data.shuffle_window + 1, -(-data.num_samples // lanes))
    stored = data.image_bytes + label_bytes(data) + _SAMPLE_OVERHEAD
    share = share_of(options, 0, ranks)
    num_views = len(options.method.views)
    pixels = num_views * 3 * options.model.image_size**2
    waiting = num_waiting(options.data.workers, share.micro_batch_size)
    return [
        Need(
            f"shuffle windows: {open_lanes} lanes x {window} encoded images",
            open_lanes * window * stored,
            "data.shuffle_window, data.lanes a multiple of ranks x workers",
        ),
        Need(
            f"batches: {share.micro_batch_size} samples x {num_views} views, twice, and {waiting} that wait",
            # those that wait are bytes, not normalised
            2 * share.micro_batch_size * (pixels * _FLOAT + 2 * data.num_classes) + waiting * pixels,
            "train.global_batch_size, train.accumulation_steps, model.image_size",
        ),
    ]


def _zoo_state(data: DataSize, options: Options) -> list[Need]:
    """Return what a method of the zoo keeps: a table of every sample's labels, or SCPNet's relation and window."""
    if options.method is Method.scpnet:
        words = f"relation of the classes, {data.num_classes:,} x {data.num_classes:,}"
        return [Need(words, data.num_classes**2 * _FLOAT, is_saved=False), _window(data, options)]
    needed, budget = table_bytes(options, data.num_samples, data.num_classes), options.zoo.memory_budget_mb
    if not needed:
        return []
    is_refused = needed / 2**20 > budget
    words = f"label table of {options.method.value}, {data.num_samples:,} x {data.num_classes:,}"
    refused = f": refused, zoo.memory_budget_mb={budget}" if is_refused else ""
    return [Need(words + refused, needed, "another method", is_refused)]


def _window(data: DataSize, options: Options) -> Need:
    """Return the window of pseudo-positives that dynamic thresholds count in."""
    window = options.loss.threshold_window
    return Need(f"thresholds, the last {window:,} samples", window * data.num_classes + _PLACE, "loss.threshold_window")


def state(data: DataSize, options: Options, width: int, ranks: int) -> list[Need]:
    """Return the training state that every rank keeps, and the largest workspace of the fusion."""
    if options.method is not Method.scinet:
        return _zoo_state(data, options)
    enabled = options.fusion.enabled and options.profile is not Profile.release
    classes, is_linear = data.num_classes, options.fusion.combine is Combine.linear
    remembers = enabled and options.fusion.memory is Memory.dense
    memory = data.num_samples * classes * _FLOAT if remembers else 0
    rows = options.fusion.bank_size if enabled else 0
    row = _FLOAT * width + classes + _INDEX + (_FLOAT * classes if is_linear else 0)
    # four co-moments of each pair of classes and three sums of each; the prior; how many rows were seen
    moments = 4 * classes**2 + 3 * classes + 1
    correlation = _DOUBLE * ((2 if is_linear else 1) * moments + classes**2 + 1)
    is_fitted = enabled and options.fusion.weights is Weights.fitted
    regions = num_regions(options) if is_fitted else 0
    region_row = 2 * width * regions + 2 * classes + _INDEX
    solves = is_fitted and options.fusion.label_evidence and classes <= MOST_CLASSES
    budget = options.fusion.memory_budget_mb
    is_refused = memory / 2**20 > budget
    needs = [
        Need(
            f"confidence memory, {data.num_samples:,} x {data.num_classes:,} fp32"
            + (f": refused, fusion.memory_budget_mb={budget}" if is_refused else ""),
            memory,
            "fusion.memory=none fusion.momentum=0",
            is_refused,
        ),
        Need(f"bank, {rows:,} rows of width {width}", rows * row + _PLACE, "fusion.bank_size"),
        Need(
            f"regions of {options.fusion.region_bank_size:,} samples, {regions} each",
            (options.fusion.region_bank_size * region_row + _PLACE) if regions else 0,
            "fusion.region_bank_size",
        ),
        Need("Pearson moments", correlation),
        Need("labels known together, of each pair of classes", 3 * _FLOAT * classes**2 if solves else 0),
        _window(data, options),
    ]
    if solves or (enabled and not is_fitted and not is_linear and options.fusion.label_weight):
        share = share_of(options, 0, ranks)
        # a C x C matrix a sample and its Cholesky factor; where weights are fitted its inverse too
        matrices = 3 if is_fitted else 2
        off = "fusion.label_evidence=false" if is_fitted else "fusion.label_weight=0"
        needs.append(
            Need(
                f"label term of a step, {matrices} x {share.micro_batch_size} matrices of C x C",
                matrices * share.micro_batch_size * data.num_classes**2 * _FLOAT,
                f"{off}, train.accumulation_steps",
                is_saved=False,
            )
        )
    return [need for need in needs if need.num_bytes]


def report(data: DataSize, options: Options, width: int, ranks: int) -> str:
    """Return disk, reading and the fusion's state as tables; the model is not in them."""
    groups = {
        "disk": disk(data),
        f"host memory of each of {ranks} rank(s), reading": reading(data, options, ranks),
        "memory of each rank, fusion": state(data, options, width, ranks),
    }
    text = (
        f"{data.num_samples:,} samples, {data.num_classes:,} classes, {data.positives_an_image:.2f} positives and "
        f"{data.negatives_an_image:.2f} negatives an image, {size(data.image_bytes)} an image\n"
    )
    for title, needs in groups.items():
        if needs:
            rows = [(size(need.num_bytes), need.what, need.remedy) for need in needs]
            total = (size(sum(need.num_bytes for need in needs if not need.is_refused)), "in all", "")
            text += f"\n{title}\n" + table(("size", "what", "smaller with"), [*rows, total])
    refused = [need for need in groups["memory of each rank, fusion"] if need.is_refused]
    if refused:
        text += (
            f"Training would be refused: the confidence memory needs {size(refused[0].num_bytes)}, "
            f"fusion.memory_budget_mb={options.fusion.memory_budget_mb} allows "
            f"{size(options.fusion.memory_budget_mb * 2**20)}; raise it, or set {refused[0].remedy}.\n"
        )
    return text
