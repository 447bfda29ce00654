"""Three views of a decoded image and the plain one for evaluation (method.md section 4).

Each view draws its own crop and flip; what they share is the decoded image and the kind of transform.

The random numbers of a view depend on (seed, epoch, sample id, view) alone, so that any rank or worker draws the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from scinet.data.images import opened
from scinet.data.masks import derive

VIEW_NAMES = ("weak", "medium", "strong")
SHARD_FORMATS = ("JPEG", "PNG", "WEBP")  # the decoders that a shard may reach; others of Pillow's start programs
_RANDAUGMENT_OPS = {"weak": 0, "medium": 1, "strong": 3}
_CUTOUT_AREA = (0.05, 0.2)


@dataclass(frozen=True)
class Normalisation:
    """What the image tower was trained with: per-channel mean and standard deviation of pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Views:
    """Turns a decoded image into tensors of one size."""

    def __init__(self, image_size: int, normalisation: Normalisation, *, smallest_crop: float) -> None:
        """Prepare the transforms.

        Args:
            image_size: side of the result, pixels.
            normalisation: of the image tower.
            smallest_crop: smallest share of the image's area that a random crop keeps.
        """
        self.image_size = image_size
        to_tensor = [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(normalisation.mean), list(normalisation.std)),
        ]
        self._plain = v2.Compose([v2.Resize((image_size, image_size), antialias=True), *to_tensor])
        self._random = {
            name: v2.Compose(
                [
                    v2.RandomResizedCrop(image_size, scale=(smallest_crop, 1.0), antialias=True),
                    v2.RandomHorizontalFlip(),
                    *([v2.RandAugment(num_ops=ops)] if ops else []),
                    *to_tensor,
                    *([v2.RandomErasing(p=1.0, scale=_CUTOUT_AREA)] if name == "strong" else []),
                ]
            )
            for name, ops in _RANDAUGMENT_OPS.items()
        }

    def plain(self, image: Image.Image) -> Tensor:
        """Return the whole image, resized and normalised: [3, H, W] float32."""
        return torch.as_tensor(self._plain(image))

    def random(self, image: Image.Image, name: str, *, seed: int, epoch: int, sample_id: str) -> Tensor:
        """Return one random view: [3, H, W] float32.

        Args:
            image: RGB.
            name: weak, medium or strong.
            seed: of the run.
            epoch: or the variant number, where views are cached.
            sample_id: the id stored with the sample.
        """
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the accelerators too, and costs a tenth of a millisecond
            torch.default_generator.manual_seed(derive(seed, "views", epoch, sample_id, name))
            return torch.as_tensor(self._random[name](image))


def decode(content: bytes, where: str, *, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Return the RGB image of a file's bytes.

    Args:
        content: the file.
        where: what the image is called in a message.
        formats: Pillow's names of those that may be tried; None: all it knows.

    Raises:
        DataError: saying ``where`` the image is that cannot be decoded.
    """
    with opened(content, f"{where}: the image", formats) as image:
        return image.convert("RGB")
