"""What can be refused before torch is imported, in a second instead of several: data and the name of the backbone."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from scinet import rundir
from scinet.data import mask_file, sources
from scinet.data.card import DataCard
from scinet.data.share import share_of
from scinet.errors import ConfigError, nearest
from scinet.options import EMBEDDED, OWN_BACKBONES, Method, Options
from scinet.rundir import RunDirectory

_PURPOSES = {"train": "train on", "holdout": "select the best epoch by", "test": "test on"}


def check_start(options: Options, world_size: int) -> None:
    """Check all that a training needs before it starts, on each rank alike.

    Raises:
        ConfigError: as :func:`check`; if the run directory holds another run, or the global batch does not divide.
        CheckpointError: if the baseline is no run, or has not ended.
    """
    card = check(options)
    if world_size == 1:
        # among several ranks the first one's disk counts, which says it to all once they have met
        rundir.check(options)
    if options.resume and RunDirectory(Path(options.output) / options.name).evaluation.is_file():
        return  # there is nothing to go on with
    if options.method is not Method.zero_shot:
        share_of(options, 0, world_size).steps(card.split("train").num_samples)
    if options.baseline:
        _check_baseline(Path(options.baseline))


def check(options: Options) -> DataCard:
    """Return the data card of a run that can begin, as far as can be told without torch.

    Raises:
        ConfigError: if the folder is missing, its address cannot be opened as it is written, a split is empty, or no
            backbone has that name.
        DataError: if it is damaged, or the mask of ``data.mask_file`` lacks a training sample.
    """
    check_backbone(options.model.backbone)
    card = sources.read_card(options.data)
    for split, purpose in _PURPOSES.items():
        is_needed = options.train.test_at_end if split == "test" else options.method is not Method.zero_shot
        if is_needed and (split not in card.splits or not card.splits[split].num_samples):
            raise ConfigError(
                f"{sources.place(card)} has no samples to {purpose} (split '{split}'; it has {card.listing}): build it "
                "anew with another --holdout share, or more --test samples"
            )
    if options.data.mask_file:
        mask_file.check_covers(Path(options.data.mask_file), card)
    return card


def doubts(card: DataCard) -> Iterator[str]:
    """Yield what makes the figures of a run on this data say little."""
    for name in ("holdout", "test"):
        split = card.splits.get(name)
        if split is not None and not any(split.num_negatives):
            yield (
                f"split '{name}' of {sources.place(card)} has no label that is known to be absent, so its mAP is 100 "
                "whatever a model says"
            )


def check_backbone(name: str) -> None:
    """Check that a backbone has that name: one of ours, or one that open_clip has a configuration of.

    Raises:
        ConfigError: naming the nearest.
    """
    if name in OWN_BACKBONES or name.startswith(("local-dir:", "hf-hub:")):
        return
    spec = importlib.util.find_spec("open_clip")
    folders = [] if spec is None else spec.submodule_search_locations or []
    known = sorted(path.stem for folder in folders for path in Path(folder, "model_configs").glob("*.json"))
    if name.replace("/", "-") not in known:
        raise ConfigError(f"model.backbone='{name}' is no open_clip model{nearest(name, [EMBEDDED, *known])}")


def _check_baseline(path: Path) -> None:
    if "teacher" not in rundir.read_evaluation(rundir.find(path)[0]).get("selected", {}):
        raise ConfigError(f"'baseline' is {path}, which has no test score of a trained network to show beside this one")
