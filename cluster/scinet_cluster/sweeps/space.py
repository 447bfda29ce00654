"""What a sweep searches: options of the training, each with a range or a list of choices."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from scinet import config
from scinet.errors import ConfigError, nearest
from scinet.options import Options

_WORDS = ("low", "high", "log")


@dataclass(frozen=True)
class Dimension:
    """One searched option.

    Attributes:
        distribution: its range or choices.
        default: its value in the training's configuration, which may lie outside.
    """

    distribution: BaseDistribution
    default: Any


def flattened(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and what each is given: a value, a list, or a mapping with ``low`` and ``high``."""
    for key, value in tree.items():
        if isinstance(value, dict) and value and not (set(value) & set(_WORDS)):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parse(tree: dict[str, Any], base: Options) -> dict[str, Dimension]:
    """Return the searched options by their dotted keys.

    Raises:
        ConfigError: naming all that is wrong: unknown options, ranges that their option does not allow.
    """
    known = {key: kind for key, _, kind in config.fields()}
    found: dict[str, Dimension] = {}
    problems = []
    for key, words in flattened(tree):
        if key not in known:
            problems.append(f"'space.{key}': there is no option '{key}'{nearest(key, known)}")
            continue
        try:
            distribution = _distribution(known[key], words)
            for value in _ends(distribution):
                config.replace(base, **{key.replace(".", "__"): value})
        except ConfigError as error:
            problems.append(f"'space.{key}': {error}")
        else:
            found[key] = Dimension(distribution, value_of(base, key))
    if problems:
        raise ConfigError("; ".join(problems))
    return found


def value_of(options: Any, key: str) -> Any:
    """Return the value of a dotted key, an enum's as its word."""
    value: Any = options
    for part in key.split("."):
        value = getattr(value, part)
    return getattr(value, "value", value)


def _distribution(kind: Any, words: Any) -> BaseDistribution:
    if isinstance(words, list):
        if not words or any(isinstance(word, (dict, list)) or word is None for word in words):
            raise ConfigError(f"found {words!r}, expected a list of values")
        return CategoricalDistribution(tuple(words))
    if kind is bool or (isinstance(kind, type) and issubclass(kind, (enum.Enum, str))) or not isinstance(words, dict):
        also = " or low and high" if kind in (int, float) else ""
        raise ConfigError(f"found {words!r}, expected a list of choices{also}")
    unknown = sorted(set(words) - set(_WORDS))
    if unknown:
        raise ConfigError(f"unknown word '{unknown[0]}'{nearest(str(unknown[0]), _WORDS)}")
    low: Any = words.get("low")
    high: Any = words.get("high")
    is_log: Any = words.get("log", False)
    types = (int,) if kind is int else (int, float)
    for name, bound in (("low", low), ("high", high)):
        if not isinstance(bound, types) or isinstance(bound, bool) or not math.isfinite(bound):
            expected = "a whole number" if kind is int else "a number"
            raise ConfigError(f"'{name}' is {bound!r}, expected {expected}")
    if not isinstance(is_log, bool):
        raise ConfigError(f"'log' is {is_log!r}, expected true or false")
    if low >= high:
        raise ConfigError(f"'low' is {low:g} and 'high' {high:g}, expected low below high")
    if is_log and low <= 0:
        raise ConfigError(f"'low' is {low:g}, expected more than 0 with 'log: true'")
    if kind is int:
        return IntDistribution(low, high, log=is_log)
    return FloatDistribution(float(low), float(high), log=is_log)


def _ends(distribution: BaseDistribution) -> tuple[Any, ...]:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return distribution.low, distribution.high
