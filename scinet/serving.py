"""Evaluate a finished run, and label images that it has never seen."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scinet import config
from scinet.errors import CheckpointError, ConfigError, DataError, nearest
from scinet.knownlabels import KnownLabels
from scinet.options import Options
from scinet.rundir import RunDirectory, find

if TYPE_CHECKING:
    from scinet.data.card import DataCard

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_BATCH = 32


def print_evaluation(path: Path, data: str, split: str, *, as_json: bool) -> None:
    """Print the metrics of a run's selected weights on a split.

    Raises:
        CheckpointError: if the run has no selected weights.
        ConfigError: if the data are missing or have other classes.
    """
    from scinet.data import card as data_card
    from scinet.data import sources

    run, options = find(path)
    config.refuse_debug(options, f"scinet evaluate --run {path}")
    if split not in data_card.SPLITS:
        raise ConfigError(f"--split is '{split}', expected one of {', '.join(data_card.SPLITS)}")
    card, class_names = read_card(run, options, data)
    import torch

    from scinet.data.views import Views
    from scinet.distributed import Ranks
    from scinet.evaluation import fused
    from scinet.evaluation.evaluator import PlainSplit
    from scinet.evaluation.metrics import evaluate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = Ranks(0, 1, device)
    classifier = _classifier(run, class_names, device)
    views: Views
    results = {}
    for who in ("teacher", "student"):
        network, views = load(run, options, class_names, who, device)
        images = PlainSplit(card, split, views, None, options=options.data)
        if who == "teacher" and classifier is not None:
            scores, fused_scores = fused.both(images, network, classifier, ranks)
            results["fused"] = evaluate(fused_scores.probabilities, fused_scores.truth).to_json()
        else:
            scores = images.score(network, ranks)
        results[who] = evaluate(scores.probabilities, scores.truth).to_json()
    if as_json:
        print(json.dumps({"run": str(path), "data": sources.place(card), "split": split, **results}, indent=1))
        return
    print(f"{path} on {sources.place(card)}, {split}: {results['teacher']['num_samples']} images")
    for who, metrics in results.items():
        shown = ", ".join(
            f"{label} {metrics[key]:.2f}"
            for label, key in (("mAP", "mean_average_precision"), ("CF1", "class_f1"), ("OF1", "overall_f1"))
            if metrics[key] is not None
        )
        partial = " (partial labels: known cells only)" if metrics["is_partial"] else ""
        print(f"{who}: {shown}{partial}")


def read_card(run: RunDirectory, options: Options, data: str) -> tuple[DataCard, tuple[str, ...]]:
    """Return the card of the run's data, or of others, and the class names that they share.

    Raises:
        ConfigError: if they have other classes.
    """
    from scinet.data import sources

    card = sources.read_card(options.data, data)
    class_names = _class_names(run)
    if card.class_names != class_names:
        raise ConfigError(
            f"{sources.place(card)} has the classes {', '.join(card.class_names[:5])} ... ({card.num_classes}), the "
            f"run was trained on {', '.join(class_names[:5])} ... ({len(class_names)})"
        )
    return card, class_names


@dataclass(frozen=True)
class Wanted:
    """What is printed of each image.

    Attributes:
        style: ``text``, ``json`` or ``csv``.
        top: classes shown.
        is_fused: whether the bank has a say.
        known: a table of labels that are known of the images.
        why: how many of the nearest images of the bank are named.
    """

    style: str
    top: int
    is_fused: bool = False
    known: Path | None = None
    why: int = 0


def print_predictions(path: Path, paths: Sequence[Path], wanted: Wanted) -> int:
    """Print the classes of images and return how many could not be read.

    Raises:
        CheckpointError: if the run has no selected weights, or no bank that is asked for.
        ConfigError: if a path does not exist, or no image is found.
        DataError: if the known labels do not fit.
    """
    run, options = find(path)
    config.refuse_debug(options, f"scinet predict --run {path}")
    files = list(_files(paths))
    class_names = _class_names(run)
    known = None if wanted.known is None else KnownLabels(wanted.known, class_names)
    import torch

    from scinet.data.views import decode
    from scinet.evaluation import fused

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier = load_classifier(run, class_names, device) if wanted.is_fused else None
    network, views = load(run, options, class_names, "teacher", device)
    failures = 0
    write = _writer(wanted.style, class_names, min(wanted.top, len(class_names)))
    for first in range(0, len(files), _BATCH):
        images, names = [], []
        for file in files[first : first + _BATCH]:
            try:
                images.append(views.plain(decode(file.read_bytes(), str(file))))
                names.append(file)
            except (DataError, OSError) as error:
                failures += 1
                print(f"skipped: {error}", file=sys.stderr)
        if not images:
            continue
        with torch.no_grad():
            output = network(torch.stack(images).to(device))
            probabilities, reasons = torch.sigmoid(output.logits), list[list[Any]]([[]] * len(names))
            if classifier is not None:
                labels = (
                    None
                    if known is None
                    else torch.tensor([known.of(name) for name in names], dtype=torch.int8, device=device)
                )
                query = fused.asking(output, num_regions=classifier.num_regions, observed=labels)
                probabilities = classifier.probabilities(query)
                reasons = fused.reasons(classifier, query, wanted.why, class_names) if wanted.why else reasons
        for name, row, why in zip(names, probabilities.tolist(), reasons, strict=True):
            write(name, row, why)
    if known is not None and (left := known.unused()):
        print(f"warning: {left}", file=sys.stderr)
    if failures:
        print(f"{failures} of {len(files)} images could not be read", file=sys.stderr)
    return failures


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    found = False
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
            if not inside:
                raise ConfigError(f"folder {path} holds no image ({', '.join(_SUFFIXES)})")
            found = True
            yield from inside
        elif path.is_file():
            found = True
            yield path
        else:
            beside = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
            raise ConfigError(f"{path} does not exist{nearest(str(path), beside)}")
    if not found:
        raise ConfigError("no image was named")


def _writer(style: str, class_names: tuple[str, ...], top: int) -> Callable[[Path, list[float], list[Any]], None]:
    table: Any = csv.writer(sys.stdout)
    if style == "csv":
        table.writerow(["file", *class_names])

    def write(name: Path, row: list[float], why: list[Any]) -> None:
        ranked = sorted(zip(class_names, row, strict=True), key=lambda pair: -pair[1])[:top]
        if style == "csv":
            table.writerow([str(name), *(f"{value:.4f}" for value in row)])
        elif style == "json":
            tree = {"file": str(name), "classes": {label: round(value, 4) for label, value in ranked}}
            print(json.dumps(tree | ({"why": why} if why else {})))
        else:
            print(f"{name}: " + ", ".join(f"{label} {value:.2f}" for label, value in ranked))
            for near in why:
                labels = ", ".join(near["present"]) or "none known to be present"
                print(f"    {near['weight']:.1%} {near['id']}: {labels}; {len(near['absent'])} known to be absent")

    return write


def _class_names(run: RunDirectory) -> tuple[str, ...]:
    path = run.checkpoints / "selected" / "classes.json"
    if not path.is_file():
        raise DataError(f"{run.path} has no trained weights yet: {path} is missing")
    return tuple(json.loads(path.read_text(encoding="utf-8")))


def load_classifier(run: RunDirectory, class_names: tuple[str, ...], device: Any) -> Any:
    """Return the run's fused classifier on a device.

    Raises:
        CheckpointError: if it has none, or a damaged one.
    """
    classifier = _classifier(run, class_names, device)
    if classifier is None:
        raise CheckpointError(
            f"{run.path} has no bank, which a run with fusion.weights=fixed or of an earlier version lacks: train it "
            "anew, or predict without --fused"
        )
    return classifier


def _classifier(run: RunDirectory, class_names: tuple[str, ...], device: Any) -> Any:
    """Return the run's fused classifier on a device, or None where it has none."""
    from scinet.checkpoint import weights
    from scinet.fusion.classifier import from_tensors

    path = run.checkpoints / "selected" / weights.BANK
    if not path.is_file():
        return None
    try:
        return from_tensors(weights.load_weights(path), num_classes=len(class_names)).to(device)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def load(run: RunDirectory, options: Options, class_names: tuple[str, ...], who: str, device: Any) -> tuple[Any, Any]:
    """Return the selected teacher or student on a device, from images to outputs, and the views it was trained on."""
    from scinet.checkpoint import weights
    from scinet.data.views import Views
    from scinet.model import backbone as model_backbone
    from scinet.model.network import Network
    from scinet.paths import cache_directory

    backbone = model_backbone.load(options.model, cache_directory(options.data.cache_dir))
    backbone.text.to(device)
    backbone.image.to(device)
    network = Network(backbone, class_names, options.model, top_k=options.correlation.graph_top_k).to(device).eval()
    weights.load_into(network, run.checkpoints / "selected" / f"{who}.safetensors")

    def forward(images: Any) -> Any:
        # trained on cached features: the network must see no other regions here than those had, if any
        data = options.data
        return network(network.extract(images, side=data.cached_regions) if data.cache_features else images)

    return forward, Views(options.model.image_size, backbone.normalisation, smallest_crop=options.data.smallest_crop)
