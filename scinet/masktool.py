"""``scinet data mask``: look at a mask, of a ratio or of a file, and write it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scinet.data import card as data_card
from scinet.data import mask_file
from scinet.data.card import DataCard
from scinet.data.examples import Mask
from scinet.data.mask_file import Header, MaskTable, Row
from scinet.data.mask_rates import (
    CONFIDENCE_LEVEL,
    MaskSurvey,
    Observe,
    Rates,
    Strangers,
    from_table,
    strangers,
    wilson,
)
from scinet.errors import ConfigError, DataError
from scinet.options import DataOptions
from scinet.texttable import printable, table

_SIGNS = ("positives", "negatives")
_MOST_CLASSES_SHOWN = 100


@dataclass(frozen=True)
class Asked:
    """What the user typed; ``drawn`` says how a mask is drawn where none is read from ``source``."""

    directory: Path
    split: str
    known_ratio: float | None
    drawn: DataOptions
    source: Path | None
    negative: str | None
    unknown: str | None
    out: Path | None


@dataclass(frozen=True)
class Result:
    """What was found; ``ratios`` [C] are those the intervals were held against, None where none was asked for."""

    asked: Asked
    card: DataCard
    survey: MaskSurvey
    ratios: Rates | None
    strangers: Strangers = field(default_factory=lambda: Strangers(0, 0, []))

    @property
    def fits(self) -> bool:
        """Whether the mask has all samples and agrees with their labels; it may have samples that the shards lack."""
        has_contradictions = self.survey.num_contradictions > 0 and self.asked.source is not None
        return not (self.survey.num_missing or has_contradictions)

    @property
    def ratio(self) -> float | None:
        """The ratio of all classes, None where they differ or none was asked for."""
        return None if self.ratios is None or np.ptp(self.ratios) else float(self.ratios[0])

    def rates(self) -> tuple[Rates, Rates, Rates]:
        """Return the known rates [2, C], positives first, and the ends of their intervals; NaN without a cell."""
        total, known = self.survey.total, self.survey.known
        with np.errstate(invalid="ignore"):
            return np.where(total > 0, known / np.maximum(total, 1), np.nan), *wilson(known, total)

    def is_outside(self) -> Any:
        """Return [2, C] bool: where the interval does not hold the ratio."""
        _, low, high = self.rates()
        if self.ratios is None:
            return np.zeros_like(low, dtype=bool)
        return (self.survey.total > 0) & ((low > self.ratios) | (high < self.ratios))

    def to_json(self) -> dict[str, Any]:
        """Return everything, each class a row."""
        rates, low, high = self.rates()
        outside, survey = self.is_outside(), self.survey
        rows = [
            {"class": name, "asked_ratio": None if self.ratios is None else float(self.ratios[c])}
            | {
                sign: {
                    "known": int(survey.known[row, c]),
                    "flipped": int(survey.flipped[row, c]),
                    "of": int(survey.total[row, c]),
                    "rate": None if np.isnan(rates[row, c]) else float(rates[row, c]),
                    "interval": [float(low[row, c]), float(high[row, c])],
                    "is_outside": bool(outside[row, c]),
                }
                for row, sign in enumerate(_SIGNS)
            }
            for c, name in enumerate(self.card.class_names)
        ]
        return {
            "directory": str(self.asked.directory),
            "split": self.asked.split,
            "asked_ratio": self.ratio,
            "num_samples": survey.num_samples,
            "num_outside": int(outside.sum()),
            "num_outside_expected": self.expected_outside,
            "missing_ids": survey.num_missing,
            "unknown_ids": self.strangers.num_unknown,
            "ids_in_other_splits": self.strangers.num_in_other_splits,
            "contradictions": survey.num_contradictions,
            "known_beyond_the_shards": survey.num_added,
            "classes": rows,
        }

    @property
    def expected_outside(self) -> float:
        """About how many intervals miss the ratio by chance."""
        checked = self.survey.total > 0 if self.ratios is not None else np.zeros(0)
        return float((1 - CONFIDENCE_LEVEL) * checked.sum())


def look(asked: Asked, progress: Callable[[str, int, int], None]) -> Result:
    """Apply a mask to a split, count, and write it where asked to.

    Raises:
        ConfigError: if a file is missing or exists already, or a code can mean two things.
        DataError: if shards or mask are damaged, or a mask to be written lacks a sample.
    """
    card = data_card.read(asked.directory)
    split = card.split(asked.split)
    if asked.out is not None and asked.out.exists():
        raise ConfigError(f"{asked.out} exists: name another file with --out, or remove it")
    ratio, single_positive = asked.known_ratio, asked.drawn.single_positive
    ratios: Rates | None = None
    seed: int | None = asked.drawn.mask_seed
    found = Strangers(0, 0, [])
    observe: Observe
    if asked.source is None:
        observe = drawn = Mask(asked.drawn, card.training_positives)
        ratios = np.where(drawn.is_annotated, drawn.class_ratios, 0.0)
        ratio = ratio if np.ptp(ratios) == 0 else None
    else:
        file = MaskTable(_rows(asked, asked.source, card), card.num_classes, asked.source)
        found = strangers(card, asked.split, file, _rows(asked, asked.source, card))
        observe = from_table(file)
        if asked.source.suffix.lower() != ".csv":
            theirs = mask_file.read_header(asked.source)
            ratio = theirs.known_ratio if ratio is None else ratio
            single_positive, seed = theirs.single_positive, theirs.seed
        else:
            seed = None
        ratios = None if ratio is None else np.full(card.num_classes, ratio)
    survey = MaskSurvey(card)
    rows = survey.rows(asked.split, observe, lambda done, total: progress("samples", done, total))
    if asked.out is None:
        for _ in rows:
            pass
    else:
        header = Header(
            card.class_names, card.name, asked.split, card.sha256, split.num_samples, ratio, single_positive, seed
        )
        mask_file.write(asked.out, header, _complete(rows, survey, asked))
    return Result(asked, card, survey, None if single_positive else ratios, found)


def _rows(asked: Asked, path: Path, card: DataCard) -> Iterator[Row]:
    return mask_file.read(path, card.class_names, negative=asked.negative, unknown=asked.unknown)


def _complete(rows: Iterator[Row], survey: MaskSurvey, asked: Asked) -> Iterator[Row]:
    yield from rows
    if survey.num_missing:
        raise DataError(
            f"{asked.source} has no sample {survey.missing[0]}; {survey.num_missing} of {survey.num_samples} samples "
            f"are missing, so {asked.out} was not written"
        )
    if survey.num_contradictions:
        raise DataError(
            f"{asked.source} contradicts the shards in {survey.num_contradictions} cells, the first "
            f"{survey.contradictions[0]}, so {asked.out} was not written"
        )


def report(result: Result) -> str:
    """Return what a terminal shows."""
    survey, outside = result.survey, result.is_outside()
    rates, low, high = result.rates()
    shown = list(range(result.card.num_classes))
    if len(shown) > _MOST_CLASSES_SHOWN:
        frequent = np.argsort(-survey.total[0], kind="stable")
        marked = outside.any(0)
        shown = sorted(frequent[np.argsort(~marked[frequent], kind="stable")][:_MOST_CLASSES_SHOWN].tolist())
    own_ratios = result.ratios if result.ratio is None else None
    rows = []
    for c in shown:
        cells = [result.card.class_names[c]]
        if own_ratios is not None:
            cells.append(f"{own_ratios[c]:.3f}")
        for row in range(len(_SIGNS)):
            mark = " *" if outside[row, c] else ""
            interval = f"{low[row, c]:.3f}..{high[row, c]:.3f}{mark}" if survey.total[row, c] else ""
            rate = f"{rates[row, c]:.3f}" if survey.total[row, c] else ""
            cells += [f"{survey.known[row, c]}/{survey.total[row, c]}", rate, interval]
        rows.append(cells)
    columns = ("positives known", "rate", "95 % interval", "negatives known", "rate", "95 % interval")
    header = ("class", "asked", *columns) if own_ratios is not None else ("class", *columns)
    return table(header, rows) + "".join(f"{line}\n" for line in _summary(result, len(shown)))


def _summary(result: Result, num_shown: int) -> Iterator[str]:
    survey, num_classes = result.survey, result.card.num_classes
    if num_shown < num_classes:
        yield f"{num_shown} of {num_classes} classes are shown, marked and frequent ones first; --json has all"
    for row, sign in enumerate(_SIGNS):
        known, total = int(survey.known[row].sum()), int(survey.total[row].sum())
        yield f"{sign}: {known} of {total} known{f' ({known / total:.2%})' if total else ''}"
    if result.ratios is not None:
        num_checked = int((survey.total > 0).sum())
        held = "the asked ratio of their class" if result.ratio is None else f"{result.ratio:g}"
        yield (
            f"{int(result.is_outside().sum())} of {num_checked} intervals do not hold {held} (marked *); "
            f"about {result.expected_outside:.0f} are expected by chance"
        )
    if result.asked.drawn.flipped_labels:
        yield _flips(survey)
    if result.asked.source is not None:
        yield _told("samples of the split that the mask does not have", survey.num_missing, survey.missing)
        yield _told("ids of the mask that no split has", result.strangers.num_unknown, result.strangers.unknown)
        yield f"ids of the mask that lie in other splits: {result.strangers.num_in_other_splits}"
        yield _told("cells that contradict the shards", survey.num_contradictions, survey.contradictions)
        yield _told("cells that the shards do not know", survey.num_added, survey.added)
    if result.asked.out is not None:
        yield f"written: {result.asked.out} (data.mask_file={result.asked.out})"


def _flips(survey: MaskSurvey) -> str:
    """Say how many labels are flipped, and what that makes of the known positives: most cells are negative."""
    (known, negatives), (lost, made) = survey.known.sum(1), survey.flipped.sum(1)
    shown = known - lost + made
    share = f", so that {made / shown:.2%} of the {shown} shown as positive are wrong" if shown else ""
    return f"flipped: {lost} of {known} known positives, {made} of {negatives} known negatives{share}"


def _told(what: str, count: int, examples: list[str]) -> str:
    return f"{what}: {count}" + (f" ({printable(', '.join(examples))})" if examples else "")
