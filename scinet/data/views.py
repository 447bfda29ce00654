"""Three views of a decoded image and the plain one for evaluation (method.md section 4).

Each view draws its own crop and flip; what they share is the decoded image and the kind of transform. Views are drawn
on bytes and normalised where the batch is put together: bytes are a quarter of the memory to move.

The random numbers of a view depend on (seed, epoch, sample id, view) alone, so that any rank or worker draws the same.

Shapes: V views, S side of a view.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scinet import deferred_imports
from scinet.data.images import IMAGE_FORMATS, format_of, opened
from scinet.data.masks import derive
from scinet.errors import DataError

VIEW_NAMES = ("weak", "medium", "strong")
SHARD_FORMATS = tuple(IMAGE_FORMATS.values())  # the decoders that a shard may reach; others of Pillow's start programs
_RANDAUGMENT_OPS = {"weak": 0, "medium": 1, "strong": 3}
# what torchvision's RandomResizedCrop and RandomErasing take by default
_CROP_RATIO, _CUTOUT_RATIO = (3 / 4, 4 / 3), (0.3, 3.3)
_CUTOUT_AREA = (0.05, 0.2)
_ATTEMPTS = 10
# a JPEG decoded small has to stay this many times larger than the view, as for Pillow's `reducing_gap`
_REDUCING_GAP = 2.0


@dataclass(frozen=True)
class Normalisation:
    """What the image tower was trained with: per-channel mean and standard deviation of pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Box(NamedTuple):
    """A part of an image, pixels."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Drawn:
    """Views as they are drawn: pixels [V, S, S, 3] uint8, and what is cut out of each once it is normalised."""

    pixels: Tensor
    cutouts: tuple[Box | None, ...]


class Views:
    """Turns a decoded image, [3, H, W] uint8, into tensors of one size."""

    def __init__(self, image_size: int, normalisation: Normalisation, *, smallest_crop: float) -> None:
        """Prepare the transforms.

        Args:
            image_size: side of the result, pixels.
            normalisation: of the image tower.
            smallest_crop: smallest share of the image's area that a random crop keeps.
        """
        self.image_size, self._smallest_crop = image_size, smallest_crop
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (normalisation.mean, normalisation.std))
        self._scale, self._shift = 1 / (255 * std), -mean / std

    @cached_property
    def _augment(self) -> dict[str, Any]:
        deferred_imports.defer()
        from torchvision.transforms import v2

        return {name: v2.RandAugment(num_ops=ops) for name, ops in _RANDAUGMENT_OPS.items() if ops}

    @property
    def enough_pixels(self) -> int:
        """The shorter side of an image beyond which more pixels hardly change a random view."""
        return math.ceil(_REDUCING_GAP * self.image_size / math.sqrt(self._smallest_crop * _CROP_RATIO[0]))

    def plain(self, image: Tensor) -> Tensor:
        """Return the whole image, resized and normalised: [3, S, S] float32."""
        pixels = self._resize(image, Box(0, 0, image.shape[2], image.shape[1]), is_flipped=False)
        return self._normalised(Drawn(pixels.unsqueeze(0), (None,)))[0]

    def random(self, image: Tensor, name: str, *, seed: int, epoch: int, sample_id: str) -> Tensor:
        """Return one random view, normalised: [3, S, S] float32; the arguments are those of :meth:`draw`."""
        return self._normalised(self.draw(image, (name,), seed=seed, epoch=epoch, sample_id=sample_id))[0]

    def draw(self, image: Tensor, names: Sequence[str], *, seed: int, epoch: int, sample_id: str) -> Drawn:
        """Return random views, not yet normalised.

        Args:
            image: [3, H, W] uint8, as :func:`decode` returns it.
            names: of weak, medium and strong.
            seed: of the run.
            epoch: or the variant number, where views are cached.
            sample_id: the id stored with the sample.
        """
        pixels = torch.empty(len(names), self.image_size, self.image_size, 3, dtype=torch.uint8)
        cutouts = []
        for view, name in zip(pixels, names, strict=True):
            generator = random.Random(derive(seed, "views", epoch, sample_id, name))
            box = crop_box(generator, image.shape[2], image.shape[1], self._smallest_crop)
            drawn = self._resize(image, box, is_flipped=generator.random() < 0.5)
            if _RANDAUGMENT_OPS[name]:
                drawn = self._augmented(drawn, name, generator.getrandbits(63))
            view.copy_(drawn)
            cutouts.append(cutout_box(generator, self.image_size) if name == "strong" else None)
        return Drawn(pixels, tuple(cutouts))

    def normalise(self, drawn: Drawn, out: Tensor) -> None:
        """Write views as the image tower wants them, [V, 3, S, S] float32, into memory that is there."""
        for pixels, cutout, view in zip(drawn.pixels, drawn.cutouts, out, strict=True):
            view.copy_(pixels.permute(2, 0, 1)).mul_(self._scale).add_(self._shift)
            if cutout is not None:
                left, top, width, height = cutout
                view[:, top : top + height, left : left + width] = 0

    def _normalised(self, drawn: Drawn) -> Tensor:
        out = torch.empty(len(drawn.pixels), 3, self.image_size, self.image_size)
        self.normalise(drawn, out)
        return out

    def _resize(self, image: Tensor, box: Box, *, is_flipped: bool) -> Tensor:
        """Return a part of the image as [S, S, 3] uint8, bilinear with antialiasing."""
        part = image[None, :, box.top : box.top + box.height, box.left : box.left + box.width]
        # on bytes whose channels are last torch is three times as fast as Pillow, and within one level of it; a part of
        # such an image would come out with the channels first
        part = part.contiguous(memory_format=torch.channels_last)
        size = (self.image_size, self.image_size)
        resized = torch.nn.functional.interpolate(part, size, mode="bilinear", antialias=True)
        return (resized.flip(-1) if is_flipped else resized)[0].permute(1, 2, 0)

    def _augmented(self, pixels: Tensor, name: str, seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the accelerators too, and costs a tenth of a millisecond
            torch.default_generator.manual_seed(seed)
            # torchvision's operations are faster on Pillow's images than on tensors
            image = self._augment[name](Image.fromarray(pixels.contiguous().numpy()))
        return torch.from_numpy(np.array(image))


def crop_box(generator: random.Random, width: int, height: int, smallest_area: float) -> Box:
    """Draw a crop as torchvision's ``RandomResizedCrop`` does: area uniform, logarithm of the aspect ratio uniform.

    Args:
        generator: of the view.
        width: of the image.
        height: of the image.
        smallest_area: share of the image's area.
    """
    low, high = math.log(_CROP_RATIO[0]), math.log(_CROP_RATIO[1])
    for _ in range(_ATTEMPTS):
        area = width * height * generator.uniform(smallest_area, 1.0)
        ratio = math.exp(generator.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(_place(generator, width - w), _place(generator, height - h), w, h)
    # an image so long that no crop fits: its middle
    w = min(width, max(1, round(height * _CROP_RATIO[1])))
    h = min(height, max(1, round(width / _CROP_RATIO[0])))
    return Box((width - w) // 2, (height - h) // 2, w, h)


def _place(generator: random.Random, last: int) -> int:
    """Draw a whole number from 0 to ``last``; at another scale of the image it is the same part of the way."""
    return int(generator.random() * (last + 1))


def cutout_box(generator: random.Random, size: int) -> Box | None:
    """Draw what is cut out of a square view as torchvision's ``RandomErasing`` does; None if nothing fitted."""
    low, high = math.log(_CUTOUT_RATIO[0]), math.log(_CUTOUT_RATIO[1])
    for _ in range(_ATTEMPTS):
        area = size * size * generator.uniform(*_CUTOUT_AREA)
        ratio = math.exp(generator.uniform(low, high))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < size and w < size:
            return Box(_place(generator, size - w), _place(generator, size - h), w, h)
    return None


@cache
def _jpeg_decoder() -> Callable[[Tensor], Tensor]:
    deferred_imports.defer()
    from torchvision.io import ImageReadMode, decode_jpeg

    return partial(decode_jpeg, mode=ImageReadMode.RGB)


def decode(content: bytes, where: str, *, formats: tuple[str, ...] | None = None, enough_pixels: int = 0) -> Tensor:
    """Return the RGB image of a file's bytes: [3, H, W] uint8, the channels last in memory.

    Args:
        content: the file.
        where: what the image is called in a message.
        formats: Pillow's names of those that may be tried; None: all it knows.
        enough_pixels: a JPEG is decoded at a half, a quarter or an eighth of its size as long as its shorter side
            keeps this many; 0: always in full.

    Raises:
        DataError: saying ``where`` the image is that cannot be decoded.
    """
    what = f"{where}: the image"
    with opened(content, what, formats) as image:
        is_jpeg = format_of(image) == "JPEG" and image.mode in ("RGB", "L")
        reduction = min(image.size) // enough_pixels if enough_pixels else 1
        if is_jpeg and reduction < 2:
            try:
                # the same pixels as Pillow's, in three quarters of the time; Pillow has checked the size
                return torch.as_tensor(_jpeg_decoder()(torch.frombuffer(bytearray(content), dtype=torch.uint8)))
            except RuntimeError as error:
                raise DataError(f"{what} cannot be decoded ({len(content)} bytes): {error}") from error
        if is_jpeg:
            image.draft("RGB", (image.width // reduction, image.height // reduction))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
