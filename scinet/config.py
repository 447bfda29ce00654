"""Configuration files and overrides become one checked, frozen :class:`~scinet.options.Options`.

Precedence: defaults < the file's parent (``extends:``) < the file < ``key=value``. All problems are reported together,
each with the key as the user typed it (design.md, configuration).
"""

from __future__ import annotations

import dataclasses
import enum
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from scinet.errors import ConfigError, nearest
from scinet.options import (
    DEBUG,
    BiDominant,
    DataOptions,
    FusionOptions,
    Head,
    Memory,
    Method,
    Options,
    Profile,
    Prometheus,
    TelemetryOptions,
    Weights,
)

T = TypeVar("T")
_Known = dict[str, tuple[dataclasses.Field[Any], Any]]
# what the run decides in DeepSpeed's section, and where it is said instead
_DERIVED = {
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"): (
        "'train.global_batch_size' and 'train.accumulation_steps'"
    ),
    ("bf16", "fp16", "amp", "torch_autocast", "data_types"): "'train.precision'",
    ("optimizer", "scheduler", "gradient_clipping"): "the 'optimizer' section",
}
_ACT_ON_FITTED = ("instance_evidence", "label_evidence", "region_evidence", "region_bank_size")
_ACT_ON_FIXED = (
    *("combine", "instance_weight", "label_weight", "bandwidth", "bandwidth_value", "bandwidth_neighbours", "radius"),
    "prior_strength",
)
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def load(path: Path | None = None, overrides: Sequence[str] = ()) -> Options:
    """Return the checked configuration of a training: of a file with ``key=value`` overrides.

    Args:
        path: a YAML file, or None for the defaults.
        overrides: dotted assignments such as ``data.known_ratio=0.1``.

    Raises:
        ConfigError: naming every unknown key, wrong type and value out of range, or the file that cannot be read.
    """
    return _related(load_as(Options, path, overrides))


def refuse_debug(options: Options, what: str) -> None:
    """Refuse the random towers of ``model.backbone=debug`` where a result is wanted.

    Args:
        options: of the run.
        what: wants it, as a message names it.

    Raises:
        ConfigError: naming a backbone that would do.
    """
    if options.model.backbone == DEBUG:
        raise ConfigError(
            f"{what} wants a result, and 'model.backbone=debug' has random towers, for tests and work on the trainer: "
            "set 'model.backbone=embedded', or a name of open_clip"
        )


def load_as(section: type[T], path: Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Return a tree of options of any kind, checked field by field; otherwise as :func:`load`.

    Args:
        section: a dataclass whose fields are made by :func:`scinet.options.option`, or are such dataclasses.
        path: a YAML file, or None for the defaults.
        overrides: dotted assignments.

    Raises:
        ConfigError: as :func:`load`.
    """
    return _checked(section, [*_files(path), *_assignments(overrides)])


def _checked(section: type[T], trees: list[tuple[str, dict[str, Any]]]) -> T:
    """Return the options of trees, each with the words that say where it stands; later ones win."""
    problems: list[str] = []
    given: dict[str, Any] = {}
    known = {key: (item, kind) for key, item, kind in fields(section)}
    for origin, tree in trees:
        for key, value in _leaves(tree, known):
            problem = _check_leaf(key, value, known)
            if problem:
                problems.append(f"{origin}{problem}")
            else:
                given[key] = _merged(given.get(key), value)
    if problems:
        raise ConfigError("; ".join(problems))
    options: T = _build(section, given, "")
    return options


def _related(options: Options) -> Options:
    problems = list(_relations(options))
    if problems:
        raise ConfigError("; ".join(problems))
    return options


def _merged(old: Any, new: Any) -> Any:
    """Return the later value; mappings (DeepSpeed's section) are merged key by key, as the sections of ours are."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


def to_yaml(options: Any) -> str:
    """Return resolved options as YAML that :func:`load`, or :func:`load_as`, reads back to the same options."""
    return OmegaConf.to_yaml(OmegaConf.structured(options))


def replace(options: Options, **changes: Any) -> Options:
    """Return the options with dotted keys changed, ``__`` standing for the dot, checked like a file's.

    Raises:
        ConfigError: as :func:`load`.
    """
    whole = OmegaConf.to_container(OmegaConf.structured(options), enum_to_str=True)
    trees = [("", typing.cast("dict[str, Any]", whole))]
    for key, value in changes.items():
        tree: Any = value.value if isinstance(value, enum.Enum) else value
        for part in reversed(key.split("__")):
            tree = {part: tree}
        trees.append(("", tree))
    return _related(_checked(Options, trees))


def _files(path: Path | None, below: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    if path is None:
        return []
    if path.resolve() in below:
        raise ConfigError(f"{path} extends itself, through {len(below)} file(s): remove one `extends:`")
    tree = read_tree(path)
    parent = tree.pop("extends", None)
    chain = _files(path.parent / str(parent), (*below, path.resolve())) if parent is not None else []
    return [*chain, (f"{path}: ", tree)]


def read_tree(path: Path) -> dict[str, Any]:
    """Return a YAML file as a plain tree, unchecked but for being a mapping.

    Raises:
        ConfigError: if it does not exist or cannot be read.
    """
    if not path.is_file():
        beside = [str(found) for found in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
        raise ConfigError(f"configuration file {path} does not exist{nearest(str(path), beside)}")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        first = " ".join(str(error).split())
        raise ConfigError(f"{path} is not readable as YAML: {first}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, found {type(tree).__name__}")
    return typing.cast("dict[str, Any]", tree)


def _assignments(overrides: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    trees = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{text}' is not an override; write key=value, for example data.known_ratio=0.1")
        try:
            # `baseline=` empties a text; YAML would read nothing as null
            tree = OmegaConf.to_container(OmegaConf.from_dotlist([text if value else f"{text}''"]))
        except (YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"'{text}' cannot be read: {' '.join(str(error).split())}") from error
        trees.append(("", typing.cast("dict[str, Any]", tree)))
    return trees


def _leaves(tree: Any, known: _Known, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values; a mapping whose inside is not ours, like DeepSpeed's section, is one value."""
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        _, kind = known.get(dotted, (None, None))
        if isinstance(value, dict) and value and not _is_mapping(kind):
            yield from _leaves(value, known, f"{dotted}.")
        else:
            yield dotted, value


def fields(section: Any = Options, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yield the dotted key, the field and the type of every option of a section."""
    hints = typing.get_type_hints(section)
    for item in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from fields(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item, hints[item.name]


def _is_mapping(kind: Any) -> bool:
    origin: Any = typing.get_origin(kind)
    return origin is dict


def _check_leaf(key: str, value: Any, known: _Known) -> str | None:
    if key not in known:
        sections = {name.partition(".")[0] for name in known if "." in name}
        if key in sections:
            return f"'{key}' is a section of options, found {value!r}"
        if key.partition(".")[0] in known:
            return f"'{key.partition('.')[0]}' is one value, not a section"
        return f"unknown key '{key}'{nearest(key, known)}"
    item, kind = known[key]
    if value is None:
        return f"'{key}' has no value, expected {_describe(kind)}"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        choices = [member.value for member in kind]
        return (
            None
            if _spelled(value) in choices
            else (f"'{key}' is {value!r}, expected one of {', '.join(choices)}{nearest(str(value), choices)}")
        )
    if not _fits(kind, value):
        return f"'{key}' is {value!r}, expected {_describe(kind)}"
    low, high = item.metadata["low"], item.metadata["high"]
    if (low is not None and value < low) or (high is not None and value > high) or value != value:
        bounds = f"from {low:g} to {high:g}" if high is not None else f"at least {low:g}"
        return f"'{key}' is {value!r}, expected a number {bounds}"
    return None


def _spelled(value: Any) -> Any:
    """Return a choice as it was written: YAML reads `off` as false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _fits(kind: Any, value: Any) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (bool, str):
        return isinstance(value, kind) or (kind is str and isinstance(value, (int, float)))
    return isinstance(value, dict)


def _describe(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "one of " + ", ".join(member.value for member in kind)
    return _TYPE_NAMES.get(kind, "a section")


def _build(section: Any, given: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(section)
    values = {}
    for item in dataclasses.fields(section):
        key, kind = f"{prefix}{item.name}", hints[item.name]
        if dataclasses.is_dataclass(kind):
            values[item.name] = _build(kind, given, f"{key}.")
        elif key in given:
            values[item.name] = _value(kind, given[key])
    return section(**values)


def _value(kind: Any, given: Any) -> Any:
    if _is_mapping(kind):
        return given
    return kind(_spelled(given) if issubclass(kind, enum.Enum) else given)


def _relations(options: Options) -> Iterator[str]:
    data, model, fusion, train = options.data, options.model, options.fusion, options.train
    if data.cache_features and not model.freeze_image:
        yield "'data.cache_features' needs 'model.freeze_image=true': features of a tower that trains go stale"
    yield from _head_relations(options)
    if data.mask_file and data.single_positive:
        yield "'data.single_positive' makes a mask and 'data.mask_file' reads one: set one of the two"
    yield from _label_relations(data)
    if fusion.momentum > 0 and fusion.memory is Memory.none:
        yield "'fusion.momentum' above 0 needs 'fusion.memory=dense': set that, or 'fusion.momentum=0'"
    yield from _fusion_relations(fusion)
    if options.profile is Profile.release and model.bi_dominant is not BiDominant.none:
        yield "'profile=release' has a text-only prompter: set 'model.bi_dominant=none'"
    if train.global_batch_size % train.accumulation_steps:
        yield (
            f"'train.global_batch_size' is {train.global_batch_size}, expected a multiple of "
            f"'train.accumulation_steps' ({train.accumulation_steps})"
        )
    if options.method is not Method.zero_shot and options.optimizer.learning_rate == 0 and not model.freeze_image:
        yield "'optimizer.learning_rate' is 0: nothing would train; for the untrained model set 'method=zero_shot'"
    if options.method is Method.zero_shot and not train.test_at_end:
        yield "'train.test_at_end=false' leaves 'method=zero_shot' nothing to do: it only scores the test split"
    if not options.name or Path(options.name).name != options.name:
        yield f"'name' is {options.name!r}, expected a plain folder name"
    yield from _telemetry_relations(options.telemetry)
    for keys, instead in _DERIVED.items():
        for key in keys:
            if key in options.deepspeed:
                yield f"'deepspeed.{key}' is derived: set {instead}"


def _head_relations(options: Options) -> Iterator[str]:
    data, head = options.data, options.model.head
    if data.cached_regions and not data.cache_features:
        yield "'data.cached_regions' needs 'data.cache_features=true': without a cache all regions of an image are seen"
    if data.cache_features and head.needs_regions and not data.cached_regions:
        yield (
            f"'model.head={head.value}' looks at the regions of an image, which 'data.cache_features' leaves out: set "
            "'data.cached_regions', such as 4 for a grid of 4 x 4"
        )
    if options.method is Method.dualcoop and head is not Head.dualcoop:
        yield f"'method=dualcoop' is the loss of one head, found 'model.head={head.value}': add 'model.head=dualcoop'"
    if head is Head.dualcoop and not options.model.context.strip():
        yield "'model.head=dualcoop' learns its prompts from 'model.context', which is empty: set it to some words"


def _fusion_relations(fusion: FusionOptions) -> Iterator[str]:
    default, is_fitted = FusionOptions(), fusion.weights is Weights.fitted
    other = _ACT_ON_FIXED if is_fitted else _ACT_ON_FITTED
    for name in other:
        if getattr(fusion, name) != getattr(default, name):
            needed = Weights.fixed if is_fitted else Weights.fitted
            yield f"'fusion.{name}' acts with 'fusion.weights={needed.value}' alone: set that too, or leave it out"


def _label_relations(data: DataOptions) -> Iterator[str]:
    changed = {
        "'data.class_ratio_spread'": data.class_ratio_spread > 0,
        "'data.annotated_classes'": data.annotated_classes < 1,
        "'data.flipped_labels'": data.flipped_labels > 0,
    }
    for key in [key for key, is_changed in changed.items() if is_changed]:
        if data.mask_file:
            yield f"{key} changes how a mask is drawn and 'data.mask_file' reads one: set one of the two"
        elif data.single_positive and key != "'data.annotated_classes'":
            yield f"{key} needs labels of 'data.known_ratio', which 'data.single_positive' replaces: set one of the two"


def _telemetry_relations(telemetry: TelemetryOptions) -> Iterator[str]:
    has_gateway = telemetry.push_gateway.startswith(("http://", "https://"))
    if telemetry.prometheus is Prometheus.push and not has_gateway:
        yield (
            f"'telemetry.prometheus=push' needs 'telemetry.push_gateway', a URL such as http://127.0.0.1:9091, found "
            f"{telemetry.push_gateway!r}"
        )
    if not telemetry.host:
        yield "'telemetry.host' is empty, expected an address such as 127.0.0.1, or 0.0.0.0 to let other machines in"
