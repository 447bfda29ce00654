"""Which labels are known: a pure function of (sample id, class index, seed), equal everywhere (method.md section 1)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

KNOWN_POSITIVE, KNOWN_NEGATIVE, UNKNOWN = 1, -1, 0
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def text_key(text: str) -> int:
    """Return a 64-bit key of a text, equal on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64-bit counters so that neighbours are unrelated.

    Args:
        values: [N] uint64.

    Returns:
        [N] uint64.

    Source: the splitmix64 finaliser (Steele et al., "Fast splittable pseudorandom number generators", 2014).
    """
    with np.errstate(over="ignore"):
        z = values + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


def derive(*parts: int | str) -> int:
    """Return a 63-bit seed for a purpose, for instance ``derive(seed, "views", epoch, sample_id)``."""
    return text_key("\x1f".join(map(str, parts))) >> 1


def uniform(text: str) -> float:
    """Return the hash of a text as a number in [0, 1), for decisions that a sample's id alone should settle."""
    return float(_unit_interval(mix(np.array([text_key(text)], dtype=np.uint64)))[0])


def _unit_interval(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    return (values >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniforms(sample_id: str, num_classes: int, seed: int) -> npt.NDArray[np.float64]:
    """Return the cell hashes of one sample.

    Args:
        sample_id: the id stored with the sample.
        num_classes: C.
        seed: the mask seed.

    Returns:
        [C] float64 in [0, 1); a cell is known at ratio rho iff its value is below rho, so masks are nested over rho.
    """
    return _unit_interval(mix(_cell_keys(num_classes, seed) ^ np.uint64(text_key(sample_id))))


@lru_cache(maxsize=8)
def _cell_keys(num_classes: int, seed: int) -> npt.NDArray[np.uint64]:
    """Return what the classes of one seed have in common over all samples: [C] uint64."""
    # mixed twice: once, like the classes, class a of seed b would be class b of seed a
    return np.bitwise_xor(mix(np.arange(num_classes, dtype=np.uint64)), mix(mix(np.array([seed], dtype=np.uint64))))


def class_ratios(known_ratio: float, num_classes: int, *, spread: float, seed: int) -> npt.NDArray[np.float64]:
    """Return the known ratio of each class where some are annotated more than others.

    Args:
        known_ratio: rho, the mean over the classes, in [0, 1].
        num_classes: C.
        spread: in [0, 1].
        seed: the mask seed.

    Returns:
        [C] float64: rho_c = rho + spread * min(rho, 1 - rho) * e_c, where e_c are the C middles of equal parts of
        [-1, 1], dealt out by a hash of the class. It never falls where rho grows, so masks stay nested over rho.

    Source: ours.
    """
    order = np.argsort(uniforms("class ratios", num_classes, derive(seed, "class ratios")), kind="stable")
    places = np.empty(num_classes)
    places[order] = np.arange(num_classes)
    return np.asarray(known_ratio + spread * min(known_ratio, 1 - known_ratio) * ((2 * places + 1) / num_classes - 1))


def annotated(share: float, num_positives: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Return which classes are annotated at all: the most frequent ones.

    Args:
        share: of the classes, in (0, 1]; at least one is annotated.
        num_positives: [C], known positives in the training split; of equal ones the first class comes first.

    Returns:
        [C] bool; nested over the share.
    """
    is_annotated = np.zeros(len(num_positives), dtype=np.bool_)
    frequent = np.argsort(-np.asarray(num_positives), kind="stable")
    is_annotated[frequent[: max(1, round(share * len(num_positives)))]] = True
    return is_annotated


def observe(
    truth: npt.NDArray[np.int8],
    sample_id: str,
    *,
    known_ratio: float | npt.NDArray[np.float64],
    seed: int,
    single_positive: bool = False,
    flipped: float = 0.0,
) -> npt.NDArray[np.int8]:
    """Return what a partly labelled collection would show of a sample's labels.

    Args:
        truth: [C] int8; +1 present, -1 absent, 0 not known even to the collection.
        sample_id: the id stored with the sample.
        known_ratio: share of the cells that stay, in [0, 1], or that of each class [C]; positives and negatives are
            dropped alike.
        seed: the mask seed.
        single_positive: keep only the positive with the smallest hash, instead of ``known_ratio``; never flipped.
        flipped: share of the cells that stay with the other sign, in [0, 1]; nested, by a hash that is independent of
            the one of ``known_ratio``, so that a cell's sign does not depend on how many are known.

    Returns:
        [C] int8; +1 known positive, -1 known negative, 0 unknown.
    """
    u = uniforms(sample_id, len(truth), seed)
    if not single_positive:
        if flipped:
            is_flipped = uniforms(sample_id, len(truth), derive(seed, "flipped labels")) < flipped
            truth = np.where(is_flipped, -truth, truth)
        return np.where(u < known_ratio, truth, UNKNOWN).astype(np.int8)
    observed = np.zeros_like(truth)
    positives = np.flatnonzero(truth == KNOWN_POSITIVE)
    if len(positives):
        observed[positives[np.argmin(u[positives])]] = KNOWN_POSITIVE
    return observed
