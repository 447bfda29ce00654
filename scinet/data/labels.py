"""The JSON member of a sample: its id, its index and the classes known to be present and absent, nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from scinet.texttable import is_unicode

LARGEST_JSON = 16 * 2**20
"""Bytes of a sample's JSON that are read at most."""
_LONGEST_ID = 4096


@dataclass(frozen=True)
class Labels:
    """What the JSON member of a sample says."""

    sample_id: str
    index: int
    positives: tuple[int, ...]
    negatives: tuple[int, ...]


def parse_labels(content: bytes | str, *, needs_index: bool = True) -> Labels:
    """Return the labels of a JSON member, or of a line of a mask, which has no index (-1).

    Raises:
        ValueError: with the reason, if it is not what ``scinet data build`` writes; classes are not compared here.
    """
    try:
        tree = json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from error
    if not isinstance(tree, dict):
        raise ValueError(f"a {type(tree).__name__}, expected an object")
    tree = tree if needs_index else {"index": -1, **tree}
    missing = [key for key in ("id", "index", "positives", "negatives") if key not in tree]
    if missing:
        raise ValueError(f"no '{missing[0]}'")
    if not isinstance(tree["id"], str) or not 0 < len(tree["id"]) <= _LONGEST_ID:
        raise ValueError(f"'id' is no text of 1 to {_LONGEST_ID} letters")
    if not is_unicode(tree["id"]):
        raise ValueError("'id' holds half a character")
    if not _are_ints([tree["index"]]):
        raise ValueError("'index' is no whole number")
    for key in ("positives", "negatives"):
        if not isinstance(tree[key], list) or (tree[key] and not _are_ints(tree[key])):
            raise ValueError(f"'{key}' is no list of whole numbers")
    return Labels(tree["id"], tree["index"], tuple(tree["positives"]), tuple(tree["negatives"]))


def check_range(labels: Labels, num_classes: int, num_indices: int) -> None:
    """Refuse labels that do not fit a data set.

    Raises:
        ValueError: if a class or the index is out of range, or a class is listed twice or present and absent at once.
    """
    for label in (*labels.positives, *labels.negatives):
        if not 0 <= label < num_classes:
            raise ValueError(f"class {label} of {num_classes}")
    for places in (labels.positives, labels.negatives):
        if len(set(places)) < len(places):
            raise ValueError("a class is listed twice")
    both = set(labels.positives).intersection(labels.negatives)
    if both:
        raise ValueError(f"class {min(both)} is positive and negative at once")
    if not 0 <= labels.index < num_indices:
        raise ValueError(f"index {labels.index} of {num_indices}")


def _are_ints(values: Any) -> bool:
    # json reads integers of any length; those beyond 64 bits fit no array. A bool is another type than int.
    return set(map(type, values)) <= {int} and all(-(2**62) < end < 2**62 for end in (min(values), max(values)))
