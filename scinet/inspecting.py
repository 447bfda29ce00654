"""``scinet data inspect``: the data card as a table, and the page of a data set."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from scinet.data import card as data_card
from scinet.data import census
from scinet.data.card import DataCard
from scinet.errors import ConfigError, DataError
from scinet.report.data_page import SPLIT_HEADER, class_rows, described, split_rows, write_data_page
from scinet.texttable import printable, table

_MOST_PAIRED_CLASSES = 40
_NUM_EXTREMES = 5
_LONGEST_LINE = 2000


def load(directory: Path) -> DataCard:
    """Return the card of a folder.

    Raises:
        ConfigError: if there is none.
        DataError: if it is damaged, or a shard is missing.
    """
    return data_card.read(directory)


def report(card: DataCard) -> str:
    """Return what a terminal shows of a card."""
    return table(SPLIT_HEADER, split_rows(card)) + "".join(f"{line}\n" for line in _lines(card))


def _lines(card: DataCard) -> Iterator[str]:
    rows = class_rows(card)
    yield printable(f"{card.name}: {card.num_classes} classes, card {card.sha256[:16]}")
    for what, some in (("most frequent", rows[:_NUM_EXTREMES]), ("least frequent", rows[::-1][:_NUM_EXTREMES])):
        yield printable(f"{what}: " + ", ".join(f"{row.name} {row.positives:,}" for row in some))
    never = sum(row.positives == 0 for row in rows)
    if never:
        yield f"classes without a positive: {never}"
    for what, value in described(card):
        yield printable(f"{what}: {value}", limit=_LONGEST_LINE)


def write_page(card: DataCard, path: Path, num_samples: int, progress: Callable[[str, int, int], None]) -> None:
    """Read the labels and a few images, and write the page.

    Raises:
        ConfigError: if the file cannot be written.
        DataError: if a shard is damaged.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: the folder {path.parent} does not exist")
    found = census.take(card, _MOST_PAIRED_CLASSES, progress)
    try:
        write_data_page(path, card, found, num_samples)
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"a shard of {card.directory} is damaged ({error}): see `scinet data validate`") from error
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
