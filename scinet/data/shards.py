"""Writing samples as WebDataset shards: original image bytes and a JSON of ids and sparse labels, nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import webdataset

from scinet.data import card
from scinet.data.masks import uniform
from scinet.errors import ConfigError, DataError


@dataclass(frozen=True)
class RawSample:
    """A sample as a source format yields it."""

    sample_id: str
    image: bytes
    extension: str
    positives: tuple[int, ...]
    negatives: tuple[int, ...]
    split: str


def build(
    samples: Iterable[RawSample],
    out: Path,
    *,
    name: str,
    class_names: list[str],
    source: dict[str, Any],
    holdout: float = 0.1,
    shard_samples: int = 256,
) -> card.DataCard:
    """Write shards and the data card; the folder appears whole or not at all.

    Args:
        samples: in the order they are stored; ids must be unique.
        out: a folder that does not exist yet, or is empty.
        name: name of the data set.
        class_names: C names.
        source: version, licence and options for the card.
        holdout: share of the training samples that are set aside for model selection, by a hash of their id.
        shard_samples: samples a shard.

    Raises:
        ConfigError: if ``out`` holds something already or cannot be written.
        DataError: if an id comes twice or no sample comes at all.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty: name another folder with --out, or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ConfigError(f"cannot write to {out.parent}: {error.strerror}") from error
    try:
        temporary.chmod(0o755)
        splits = _write_shards(samples, temporary, len(class_names), holdout, shard_samples)
        card.write(temporary, name=name, class_names=class_names, splits=splits, source=source)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        raise DataError(f"writing {out} failed: {error.strerror or error}; nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return card.read(out)


def _write_shards(
    samples: Iterable[RawSample], directory: Path, num_classes: int, holdout: float, shard_samples: int
) -> dict[str, card.Split]:
    writers: dict[str, _SplitWriter] = {}
    seen: set[int] = set()
    for index, sample in enumerate(samples):
        key = hash(sample.sample_id)
        if key in seen:
            raise DataError(f"sample id '{sample.sample_id}' occurs twice; ids must be unique")
        seen.add(key)
        split = sample.split
        if split == "train" and uniform(f"holdout/{sample.sample_id}") < holdout:
            split = "holdout"
        if split not in writers:
            writers[split] = _SplitWriter(directory, split, num_classes, shard_samples)
        writers[split].add(sample, index)
    if not seen:
        raise DataError("the source holds no sample: nothing was written")
    return {name: writers[name].finish() for name in card.SPLITS if name in writers}


class _SplitWriter:
    """The open shard of one split, and the split's running counts."""

    def __init__(self, directory: Path, split: str, num_classes: int, shard_samples: int) -> None:
        self._directory, self._split, self._shard_samples = directory, split, shard_samples
        self._positives, self._negatives = [0] * num_classes, [0] * num_classes
        self._shards: list[card.Shard] = []
        self._tar: webdataset.TarWriter | None = None
        self._path = directory
        self._in_shard = 0

    def add(self, sample: RawSample, index: int) -> None:
        if self._tar is None:
            self._path = self._directory / f"{self._split}-{len(self._shards):06d}.tar"
            # mtime 0: the same samples give the same bytes, hence the same checksum on every machine
            self._tar = webdataset.TarWriter(str(self._path), mtime=0)
        labels = {
            "id": sample.sample_id,
            "index": index,
            "positives": sorted(sample.positives),
            "negatives": sorted(sample.negatives),
        }
        self._tar.write(
            {
                "__key__": quote(sample.sample_id, safe="").replace(".", "%2E"),
                sample.extension: sample.image,
                "json": json.dumps(labels, ensure_ascii=False).encode(),
            }
        )
        for label in sample.positives:
            self._positives[label] += 1
        for label in sample.negatives:
            self._negatives[label] += 1
        self._in_shard += 1
        if self._in_shard == self._shard_samples:
            self._close()

    def _close(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        with self._path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._shards.append(card.Shard(self._path.name, self._in_shard, self._path.stat().st_size, digest))
        self._tar, self._in_shard = None, 0

    def finish(self) -> card.Split:
        self._close()
        return card.Split(
            num_samples=sum(shard.num_samples for shard in self._shards),
            num_positives=tuple(self._positives),
            num_negatives=tuple(self._negatives),
            shards=tuple(self._shards),
        )
