"""Label completion: what a run believes of every cell of its training images, and why (``scinet complete``)."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from scinet import config, serving
from scinet.errors import ConfigError
from scinet.rundir import find

_COLUMNS = ("id", "class", "known", "confidence", "teacher", "instance", "label", "region")


def complete(path: Path, out: Path, data: str) -> None:
    """Write a row for each cell of the training images, and print how right they are where the truth is there.

    Columns: the sample's id, the class, 1 or 0 where its label is known, the confidence Q (a known label as it is), the
    teacher's probability P, and the terms N, L and R as shifts of log-odds, each without the cell's own label.

    Args:
        path: of the run.
        out: CSV file, written whole or not at all.
        data: other shards with the same classes, or "" for the run's own.

    Raises:
        CheckpointError: if the run has no selected weights, or no bank.
        ConfigError: if the file exists, or the data are missing or have other classes.
    """
    run, options = find(path)
    config.refuse_debug(options, f"scinet complete --run {path}")
    if out.exists():
        raise ConfigError(f"{out} exists: name another file with --out, or remove it")
    card, class_names = serving.read_card(run, options, data)
    import torch

    from scinet.data.examples import Mask
    from scinet.distributed import Ranks
    from scinet.evaluation import fused
    from scinet.evaluation.evaluator import PlainSplit

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier = serving.load_classifier(run, class_names, device)
    network, views = serving.load(run, options, class_names, "teacher", device)
    mask = Mask(options.data, card.training_positives)
    images = PlainSplit(card, "train", views, None, options=options.data, mask=mask)
    computed = images.compute(fused.completed(network, classifier), Ranks(0, 1, device), with_ids=True)
    _write(out, computed, class_names)
    print(f"{out}: {len(computed.ids):,} images x {len(class_names)} classes")
    for who, figures in fused.judge_completion(computed).items():
        print(f"{who} on hidden cells: " + ", ".join(f"{what} {value:.4g}" for what, value in figures))


def _write(out: Path, computed: Any, class_names: tuple[str, ...]) -> None:
    temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(_COLUMNS)
            confidence, teacher, shifts = computed.columns
            rows = zip(computed.ids, computed.observed, confidence, teacher, shifts, strict=True)
            for name, known, *figures in rows:
                unified, probability, moved = (column.tolist() for column in figures)
                for place, label in enumerate(class_names):
                    said = {1: "1", -1: "0", 0: ""}[int(known[place])]
                    numbers = (unified[place], probability[place], *moved[place])
                    table.writerow((name, label, said, *(f"{number:.4f}" for number in numbers)))
        os.replace(temporary, out)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
