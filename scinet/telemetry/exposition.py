"""Prometheus' text format: one registry's, and those of many ranks as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import generate_latest
from prometheus_client.core import Metric

_FAMILY = "# HELP "


class _Families:
    """What prometheus_client takes for a registry."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            # when a counter was made: the text format has no place for it but a family of its own
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


def render(families: Iterable[Metric]) -> str:
    """Return families of figures as text."""
    return generate_latest(_Families(families)).decode()


def merged(texts: Iterable[str]) -> str:
    """Return several texts as one, in which each family stands once, with the samples of all.

    Args:
        texts: of :func:`render`; a family has the same type and help in all of them.
    """
    families: dict[str, list[str]] = {}
    for text in texts:
        # a line begins with the mark in no other place: labels and help have their line ends escaped
        for block in f"\n{text}".split(f"\n{_FAMILY}")[1:]:
            name = block[: block.index(" ")]
            block = block.rstrip("\n") + "\n"
            if name in families:
                families[name].append(block.split("\n", 2)[2])
            else:
                families[name] = [_FAMILY, block]
    return "".join(part for family in families.values() for part in family)
