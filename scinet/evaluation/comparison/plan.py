"""What a comparison runs: its file, checked, and the grid of cells that it spans."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scinet import config
from scinet.errors import ConfigError, nearest
from scinet.options import Options

_REQUIRED = ("output", "base", "methods", "seeds")
_KEYS = (*_REQUIRED, "known_ratios", "settings", "axes", "test_peak")
# what the grid decides of its cells
_OWN = ("seed", "data.mask_seed", "train.test_at_end", "output", "name")
_SEED = "{seed}"


@dataclasses.dataclass(frozen=True)
class Column:
    """What the methods are trained on: a share of known labels, or a named setting.

    Attributes:
        name: what the table calls it, unique.
        overrides: set after a method's own.
        known_ratio: of a column that is one.
        place: where it stands on an axis: the ratio, or the number that its name ends with.
        axis: the named axis that it stands on, or "".
    """

    name: str
    overrides: tuple[str, ...]
    known_ratio: float | None
    place: float | None
    axis: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A comparison: what runs, and where its results are kept; the first method is the one that others are held to."""

    output: Path
    base: Path
    methods: dict[str, tuple[str, ...]]
    columns: tuple[Column, ...]
    seeds: tuple[int, ...]
    test_peak: bool

    @property
    def cells_folder(self) -> Path:
        """Where finished cells lie."""
        return self.output / "cells"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training of the grid."""

    method: str
    column: Column
    seed: int
    options: Options

    def __str__(self) -> str:
        """Return what messages call it."""
        return f"{self.method}, {self.column.name}, seed {self.seed}"


def read(path: Path) -> Plan:
    """Read a comparison's file; what it does not say, methods one by one, is that of the one that it extends.

    Raises:
        ConfigError: naming the key that is wrong, and what is expected there.
    """
    tree = _tree(path)
    for key in _REQUIRED:
        if tree.get(key) in (None, "", [], {}):
            raise ConfigError(f"{path} has no '{key}'")
    try:
        plan = Plan(
            output=Path(_text(tree, "output")),
            base=Path(_text(tree, "base")),
            methods=_lists(tree["methods"], "methods"),
            columns=(*_ratios(tree), *_settings(tree), *_axes(tree)),
            seeds=tuple(_seed(seed) for seed in _listed(tree, "seeds")),
            test_peak=_flag(tree, "test_peak"),
        )
        _check(plan)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return plan


def _tree(path: Path) -> dict[str, Any]:
    """Return a file's keys over those of the one that it extends, which extends none."""
    tree = config.read_tree(path)
    if "extends" not in tree:
        return _checked_keys(path, tree)
    parent = path.parent / str(tree.pop("extends"))
    inherited = config.read_tree(parent)
    if "extends" in inherited:
        raise ConfigError(f"{path} extends {parent}, which extends another file: one level is allowed")
    under, over = _checked_keys(parent, inherited), _checked_keys(path, tree)
    merged = under | over
    if isinstance(under.get("methods"), dict) and isinstance(over.get("methods"), dict):
        merged["methods"] = under["methods"] | over["methods"]
    return merged


def _checked_keys(path: Path, tree: dict[str, Any]) -> dict[str, Any]:
    for key in tree:
        if key not in _KEYS:
            raise ConfigError(f"{path}: unknown key '{key}'{nearest(str(key), (*_KEYS, 'extends'))}")
    base = tree.get("base")
    return tree | {"base": str(path.parent / base)} if isinstance(base, str) and base else tree


def with_seeds(plan: Plan, seeds: Sequence[int]) -> Plan:
    """Return the plan with other seeds.

    Raises:
        ConfigError: one stands there twice.
    """
    changed = dataclasses.replace(plan, seeds=tuple(seeds))
    _check(changed)
    return changed


def with_methods(plan: Plan, names: str) -> Plan:
    """Return the plan with some of its methods, in its own order.

    Args:
        plan: of all.
        names: with commas between them; a name may hold commas itself.

    Raises:
        ConfigError: there is no such method.
    """
    words = [word.strip() for word in names.split(",") if word.strip()]
    known = {", ".join(part.strip() for part in name.split(",")): name for name in plan.methods}
    chosen: set[str] = set()
    while words:
        for end in range(len(words), 0, -1):
            name = ", ".join(words[:end])
            if name in known:
                chosen.add(known[name])
                words = words[end:]
                break
        else:
            raise ConfigError(
                f"--methods: '{words[0]}' is no method of this comparison{nearest(words[0], plan.methods)} "
                f"(it has {'; '.join(plan.methods)})"
            )
    if not chosen:
        raise ConfigError(f"--methods is empty, expected some of: {'; '.join(plan.methods)}")
    return dataclasses.replace(plan, methods={name: own for name, own in plan.methods.items() if name in chosen})


def expand(plan: Plan) -> list[Cell]:
    """Return the cells, method by method; a seed decides mask, initialisation and order alike.

    Raises:
        ConfigError: naming the method and column whose configuration is wrong.
    """
    return list(_cells(plan))


def unchanged(plan: Plan) -> set[str]:
    """Return the columns on axes that leave the first method as it is: where its own value of the axis stands."""
    method, overrides = next(iter(plan.methods.items()))
    placed = [column for column in plan.columns if column.axis]

    def load(column: Column) -> Options:
        return _load(plan, method, column, overrides, plan.seeds[0])

    own = load(Column("", (), None, None)) if placed else None
    return {column.name for column in placed if load(column) == own}


def _cells(plan: Plan) -> Iterator[Cell]:
    for method, overrides in plan.methods.items():
        for column in plan.columns:
            made: Options | None = None
            for seed in plan.seeds:
                # read once where seeds share it: a large grid would take seconds
                if made is None or any(_SEED in text for text in column.overrides):
                    made = _load(plan, method, column, overrides, seed)
                data = dataclasses.replace(made.data, mask_seed=seed)
                yield Cell(method, column, seed, dataclasses.replace(made, seed=seed, data=data))


def _load(plan: Plan, method: str, column: Column, overrides: Sequence[str], seed: int) -> Options:
    own = [text.replace(_SEED, str(seed)) for text in column.overrides]
    try:
        made = config.load(plan.base, [*overrides, *own, "train.test_at_end=true"])
        config.refuse_debug(made, "a comparison")
    except ConfigError as error:
        raise ConfigError(f"method '{method}', {column.name}: {error}") from error
    # only batches with bad numbers are left there
    return dataclasses.replace(made, name="training", output=str(plan.output))


def _check(plan: Plan) -> None:
    if not plan.columns:
        raise ConfigError("has none of 'known_ratios', 'settings' and 'axes': name at least one")
    _check_once("'seeds'", [str(seed) for seed in plan.seeds])
    _check_once("'known_ratios', 'settings' and 'axes'", [column.name for column in plan.columns])
    has_ratios = any(column.known_ratio is not None for column in plan.columns)
    owned = (*_OWN, "data.known_ratio") if has_ratios else _OWN
    lists = [(f"method '{name}'", own, owned) for name, own in plan.methods.items()]
    lists += [(f"setting '{c.name}'", c.overrides, _OWN) for c in plan.columns if c.known_ratio is None]
    for where, overrides, taken in lists:
        for text in overrides:
            key = text.partition("=")[0]
            if key in taken:
                raise ConfigError(f"{where} sets '{key}', which the comparison decides: take it out")


def _check_once(where: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{where} name '{twice[0]}' twice")


def _text(tree: dict[str, Any], key: str) -> str:
    if not isinstance(tree[key], str):
        raise ConfigError(f"'{key}' is {tree[key]!r}, expected text")
    return str(tree[key])


def _flag(tree: dict[str, Any], key: str) -> bool:
    value = tree.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"'{key}' is {value!r}, expected true or false")
    return value


def _listed(tree: dict[str, Any], key: str) -> list[Any]:
    value = tree.get(key) or []
    if not isinstance(value, list):
        raise ConfigError(f"'{key}' is {value!r}, expected a list such as [0, 1, 2]")
    return value


def _lists(value: Any, key: str) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, dict):
        raise ConfigError(f"'{key}' is {value!r}, expected `name: [key=value, ...]` lines")
    found: dict[str, tuple[str, ...]] = {}
    for name, overrides in value.items():
        items = [] if overrides is None else overrides
        if not isinstance(items, list) or not all(isinstance(item, str) and "=" in item for item in items):
            raise ConfigError(f"'{key}' has {overrides!r} for '{name}', expected a list such as [method=bce]")
        if str(name) in found:
            raise ConfigError(f"'{key}' name '{name}' twice")
        found[str(name)] = tuple(items)
    return found


def _ratios(tree: dict[str, Any]) -> Iterator[Column]:
    for ratio in _listed(tree, "known_ratios"):
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
            raise ConfigError(f"'known_ratios' has {ratio!r}, expected a number from 0 to 1")
        yield Column(f"{100 * ratio:g}% known", (f"data.known_ratio={ratio}",), float(ratio), float(ratio))


def _settings(tree: dict[str, Any]) -> Iterator[Column]:
    for name, overrides in _lists(tree.get("settings") or {}, "settings").items():
        yield Column(name, overrides, None, None)


def _axes(tree: dict[str, Any]) -> Iterator[Column]:
    axes = tree.get("axes") or {}
    if not isinstance(axes, dict):
        raise ConfigError(f"'axes' is {axes!r}, expected `name: {{number: [key=value, ...], ...}}` lines")
    for axis, values in axes.items():
        if not isinstance(values, dict) or not values:
            raise ConfigError(f"'axes' has {values!r} for '{axis}', expected `number: [key=value, ...]` lines")
        places: set[float] = set()
        for name, overrides in _lists(values, f"axes.{axis}").items():
            place = _number(name)
            if place is None:
                raise ConfigError(f"'axes' has '{name}' on '{axis}', expected a number")
            if place in places:
                raise ConfigError(f"'axes' has {place:g} twice on '{axis}', expected each number once")
            places.add(place)
            yield Column(f"{axis} {name}", overrides, None, place, str(axis))


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"'seeds' has {value!r}, expected a whole number, 0 or more")
    return value


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
