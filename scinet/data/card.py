"""``dataset.json``, the data card beside the shards: classes, splits, counts, checksums, source."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scinet.data.cooccurrence import Cooccurrence, from_tree
from scinet.errors import ConfigError, DataError, nearest

CARD_NAME = "dataset.json"
FORMAT = "scinet-shards-1"
SPLITS = ("train", "holdout", "test")
_MOST = 2**48  # bytes or cells; a larger count is nonsense and would overflow sums of them
_LEAST_SAMPLE_BYTES = 4 * 512  # two members of a header and a block each
_LONGEST_NAME = 255


@dataclass(frozen=True)
class Shard:
    """One tar file of a split."""

    file: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The shards of one split and what their labels say; a card of an older build has no co-occurrence."""

    num_samples: int
    num_positives: tuple[int, ...]
    num_negatives: tuple[int, ...]
    shards: tuple[Shard, ...]
    cooccurrence: Cooccurrence | None = None

    @property
    def label_density(self) -> float:
        """Share of positives among the labelled cells."""
        labelled = sum(self.num_positives) + sum(self.num_negatives)
        return sum(self.num_positives) / labelled if labelled else 0.0


@dataclass(frozen=True)
class Missing:
    """Images that the collection lists and the shards do not hold; ``file``, beside the shards, lists them."""

    not_found: int = 0
    broken: int = 0
    file: str = ""

    @property
    def count(self) -> int:
        """Both kinds."""
        return self.not_found + self.broken


@dataclass(frozen=True)
class DataCard:
    """What a folder of shards holds, and where it came from.

    The ``index`` of every sample is below ``num_indices``, and images that were left out as broken leave gaps: what is
    kept per sample wants ``num_indices`` places. ``url`` is the prefix of shards that are not local; ``where`` names
    the card in messages.
    """

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    source: dict[str, Any]
    directory: Path
    sha256: str
    num_indices: int
    missing: Missing = Missing()
    url: str = ""
    where: str = CARD_NAME

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    @property
    def num_samples(self) -> int:
        """Of all splits together."""
        return sum(split.num_samples for split in self.splits.values())

    @property
    def training_positives(self) -> tuple[int, ...]:
        """Known positives of each class in the training split; zeros without one."""
        return self.splits["train"].num_positives if "train" in self.splits else (0,) * self.num_classes

    @property
    def listing(self) -> str:
        """Each split with its number of samples, for messages."""
        return ", ".join(f"{name} ({split.num_samples})" for name, split in self.splits.items())

    def split(self, name: str) -> Split:
        """Return a split.

        Raises:
            DataError: if the card has none of that name, or it is empty.
        """
        if name not in self.splits or not self.splits[name].num_samples:
            raise DataError(f"{self.where} has no samples in split '{name}'; it has {self.listing}")
        return self.splits[name]

    def shard_paths(self, name: str) -> list[Path]:
        """Return the files of a split in their written order."""
        return [self.directory / shard.file for shard in self.split(name).shards]


def write(
    directory: Path,
    *,
    name: str,
    class_names: list[str],
    splits: dict[str, Split],
    source: dict[str, Any],
    num_indices: int,
    missing: Missing,
) -> None:
    """Write the card; the last file of a build, so that a folder with a card is a whole one."""
    tree = {
        "format": FORMAT,
        "name": name,
        "class_names": class_names,
        "num_indices": num_indices,
        "splits": {key: _split_tree(value) for key, value in splits.items()},
        "missing": {"count": missing.count} | dataclasses.asdict(missing),
        "source": source,
    }
    text = json.dumps(tree, indent=1, ensure_ascii=False)
    # a long list of numbers takes one line, not one line a number
    text = re.sub(r"\[\n[\s\d,-]+\]", lambda numbers: " ".join(numbers.group().split()), text)
    temporary = directory / f".{CARD_NAME}.part"
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.rename(directory / CARD_NAME)


def _split_tree(split: Split) -> dict[str, Any]:
    tree = dataclasses.asdict(split) | {"label_density": split.label_density}
    del tree["cooccurrence"]
    return tree if split.cooccurrence is None else tree | {"cooccurrence": split.cooccurrence.tree()}


def read(directory: Path, *, prepare: str = "scinet data build", checks_shards: bool = True) -> DataCard:
    """Return the card of a folder after checking that it and its shards are there.

    Args:
        directory: a folder written by ``scinet data build``.
        prepare: the command that makes it, named when it is missing.
        checks_shards: whether a shard that is missing or has another size is an error here.

    Raises:
        ConfigError: if the folder or the card is missing.
        DataError: if the card is not one, or a shard is missing or has another size than the card says.
    """
    path = directory / CARD_NAME
    if not directory.is_dir():
        siblings = [str(found) for found in directory.parent.glob("*")] if directory.parent.is_dir() else []
        raise ConfigError(
            f"data folder {directory} does not exist{nearest(str(directory), siblings) or ':'} make it with `{prepare}`"
        )
    if not path.is_file():
        raise ConfigError(f"{directory} holds no {CARD_NAME}, so it is no finished data set: make it with `{prepare}`")
    content = path.read_bytes()
    return parse(content, str(path), prepare=prepare, directory=directory, checks_shards=checks_shards)


def parse(
    content: bytes,
    where: str,
    *,
    prepare: str,
    directory: Path | None = None,
    url: str = "",
    checks_shards: bool = True,
) -> DataCard:
    """Return the card that a file holds.

    Args:
        content: of the file.
        where: the file's name in messages.
        prepare: the command that makes it.
        directory: of the shards, which must be there; None where they are not local.
        url: their prefix in that case.
        checks_shards: whether counts and shards that do not fit are an error here.

    Raises:
        DataError: if it is no card, or does not fit its shards.
    """
    try:
        tree = json.loads(content)
        if tree["format"] != FORMAT:
            raise ValueError(f"format '{tree['format']}', expected '{FORMAT}'")
        splits = {key: _split(value) for key, value in tree["splits"].items()}
        class_names = tuple(str(name) for name in tree["class_names"])
        if not class_names or not splits:
            raise ValueError("no class or no split")
        card = DataCard(
            name=str(tree["name"]),
            class_names=class_names,
            splits=splits,
            source=dict(tree["source"]),
            directory=Path(url) if directory is None else directory,
            sha256=hashlib.sha256(content).hexdigest(),
            # the first cards had no gaps
            num_indices=_count(tree.get("num_indices", sum(split.num_samples for split in splits.values()))),
            missing=_missing(tree.get("missing", {})),
            url=url,
            where=where,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{where} is not a data card: {type(error).__name__} {error}; rebuild it with `{prepare}`"
        ) from error
    if checks_shards:
        _check(card, where)
    return card


def _split(tree: dict[str, Any]) -> Split:
    return Split(
        num_samples=_count(tree["num_samples"]),
        num_positives=tuple(_count(count) for count in tree["num_positives"]),
        num_negatives=tuple(_count(count) for count in tree["num_negatives"]),
        shards=tuple(_shard(shard) for shard in tree["shards"]),
        cooccurrence=from_tree(tree["cooccurrence"]) if "cooccurrence" in tree else None,
    )


def _shard(tree: dict[str, Any]) -> Shard:
    shard = Shard(str(tree["file"]), _count(tree["num_samples"]), _count(tree["num_bytes"]), str(tree["sha256"]))
    if not 0 < len(shard.file) <= _LONGEST_NAME or not shard.file.isprintable():
        raise ValueError(f"a shard's name of {len(shard.file)} letters, expected up to {_LONGEST_NAME} that print")
    if shard.num_samples * _LEAST_SAMPLE_BYTES > shard.num_bytes:
        raise ValueError(f"{shard.num_samples} samples in a shard of {shard.num_bytes} bytes")
    return shard


def _missing(tree: dict[str, Any]) -> Missing:
    return Missing(_count(tree.get("not_found", 0)), _count(tree.get("broken", 0)), str(tree.get("file", "")))


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST:
        raise ValueError(f"{value!r:.40} where a count should be")
    return value


def _check(card: DataCard, path: str) -> None:
    if card.num_indices < card.num_samples:
        raise DataError(f"{path}: {card.num_indices} indices are too few for its {card.num_samples} samples")
    for name, split in card.splits.items():
        for counts in (split.num_positives, split.num_negatives):
            if len(counts) != card.num_classes:
                raise DataError(
                    f"{path}: split '{name}' counts {len(counts)} classes, the card names {card.num_classes}"
                )
        in_shards = sum(shard.num_samples for shard in split.shards)
        if in_shards != split.num_samples:
            raise DataError(f"{path}: split '{name}' has {split.num_samples} samples, its shards {in_shards} in all")
        for shard in split.shards:
            file = card.directory / shard.file
            if Path(shard.file).name != shard.file:
                raise DataError(f"{path}: shard '{shard.file}' must be a plain file name beside the card")
            if card.url:
                if not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
                    raise DataError(f"{path}: shard '{shard.file}' has no SHA-256, found '{shard.sha256}'")
                continue
            if not file.is_file():
                raise DataError(f"shard {file} is missing, {path} lists it with {shard.num_samples} samples")
            if file.stat().st_size != shard.num_bytes:
                raise DataError(
                    f"shard {file} has {file.stat().st_size} bytes, {path} says {shard.num_bytes}: "
                    "it is truncated or was replaced"
                )
