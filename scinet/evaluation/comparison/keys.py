"""What a cell is kept by: a hash of all that can change its result, so that equal cells run once."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scinet import config
from scinet.data import sources
from scinet.errors import ConfigError
from scinet.evaluation.comparison.plan import Cell
from scinet.model import backbone
from scinet.options import DataOptions, FusionOptions, Method, Options, Weights
from scinet.paths import cache_directory
from scinet.rundir import FREE_ON_RESUME, write_text

SEMANTICS = 1
"""What the training code makes of equal options. Raise it by hand with every change after which the same options, data
and weights may train to other predictions (a loss, an initialisation, an order, a default): older cells then no longer
count. Options at their defaults have no part in a key, so that a new one leaves finished cells as they are."""

REVISIONS = {Method.scpnet: 1, Method.full_labels: 1}
"""How often that has changed for one method alone; raised instead of SEMANTICS, it leaves the others' cells valid."""

# fixed weights were the only ones, and the default, when the first cells were made: their keys do not name them
_DEFAULT = Options(fusion=FusionOptions(weights=Weights.fixed))
# the mask file counts by its content, the data by their card
_WITHOUT_EFFECT = {*FREE_ON_RESUME, "name", "data.path", "data.mask_file", "train.log_every_steps"} - {
    *("train.on_bad_numbers", "train.max_bad_steps")
}
# which labels of the training images are seen, and which of them are wrong
_MASKING = (
    *("known_ratio", "single_positive", "mask_seed", "mask_file"),
    *("flipped_labels", "class_ratio_spread", "annotated_classes"),
)


@dataclasses.dataclass(frozen=True)
class Facts:
    """Hashes of what options only name.

    Attributes:
        cards: ``data.path`` to the SHA-256 of its data card.
        weights: backbone and tag to the hash of the weights.
        masks: ``data.mask_file`` to its SHA-256.
    """

    cards: dict[str, str] = dataclasses.field(default_factory=dict)
    weights: dict[str, str] = dataclasses.field(default_factory=dict)
    masks: dict[str, str] = dataclasses.field(default_factory=dict)


def look(cells: Iterable[Cell]) -> Facts:
    """Return the facts of cells as they are now.

    Raises:
        ConfigError: data, weights or a mask cannot be had.
        DataError: a data card is damaged.
    """
    facts = Facts()
    for options in (cell.options for cell in cells):
        data, weights = options.data, _weights_of(options)
        if data.path not in facts.cards:
            facts.cards[data.path] = sources.read_card(data).sha256
        if weights not in facts.weights:
            facts.weights[weights] = backbone.identify(options.model, cache_directory(data.cache_dir))
        if data.mask_file and data.mask_file not in facts.masks:
            facts.masks[data.mask_file] = _hash(Path(data.mask_file))
    return facts


def remember(facts: Facts, path: Path) -> None:
    """Keep facts beside those that a file has, so that results are found again where data and weights are not."""
    kept = dataclasses.asdict(Facts())
    with contextlib.suppress(ConfigError):
        kept = dataclasses.asdict(recall(path))
    merged = {name: kept[name] | found for name, found in dataclasses.asdict(facts).items()}
    write_text(path, json.dumps(merged, indent=1, sort_keys=True) + "\n")


def recall(path: Path) -> Facts:
    """Return the facts of a file.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    try:
        return Facts(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing, nothing was compared there yet: run without --recompute") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: a run without --recompute makes it anew") from error


def key_of(options: Options, facts: Facts) -> str | None:
    """Return what a cell is kept by, or None where a fact is missing."""
    try:
        known = [facts.cards[options.data.path], facts.weights[_weights_of(options)]]
        mask = facts.masks[options.data.mask_file] if options.data.mask_file else ""
    except KeyError:
        return None
    default = effective(_DEFAULT)
    changed = {key: value for key, value in effective(options).items() if value != default[key]}
    revision = [REVISIONS[options.method]] if options.method in REVISIONS else []
    described = json.dumps([SEMANTICS, changed, *known, mask, *revision], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def effective(options: Options) -> dict[str, Any]:
    """Return by dotted key what can change a cell's result.

    A baseline has no fusion, zero-shot no training, and neither zero-shot nor full labels a mask.
    """
    if options.method is Method.zero_shot:
        options = Options(
            method=options.method,
            data=unmasked(options.data),
            model=options.model,
            correlation=options.correlation,
            fusion=_DEFAULT.fusion,
        )
    elif options.method is not Method.scinet:
        is_whole = options.method is Method.full_labels
        data = unmasked(options.data) if is_whole else options.data
        options = dataclasses.replace(options, data=data, fusion=_DEFAULT.fusion)
    return {key: _value(options, key) for key in _keys()}


@functools.cache
def _keys() -> tuple[str, ...]:
    """Return the dotted keys that can change a result; asked for twice a cell, found once."""
    return tuple(key for key, _, _ in config.fields() if key not in _WITHOUT_EFFECT)


def unmasked(data: DataOptions) -> DataOptions:
    """Return the options of the data without what decides which labels are seen."""
    return dataclasses.replace(data, **{name: getattr(DataOptions(), name) for name in _MASKING})


def _value(options: Any, key: str) -> Any:
    for part in key.split("."):
        options = getattr(options, part)
    return options.value if isinstance(options, enum.Enum) else options


def _weights_of(options: Options) -> str:
    return f"{options.model.backbone} {options.model.pretrained}"


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"'data.mask_file' {path} cannot be read: {error.strerror}") from error
