"""Opening the images that strangers made: what cannot be decoded is said in one sentence."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator

from PIL import Image, UnidentifiedImageError

from scinet.errors import DataError

IMAGE_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
"""Extension of an image in a shard to Pillow's name of its format: the only ones that are written, read and decoded."""
REENCODED_QUALITY = 95
# read by Pillow itself: for others, such as EPS, it starts programs, which no collection of strangers' images may do
_CONVERTIBLE = ("GIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA", "ICO", "AVIF")
_EXTENSIONS = {kind: extension for extension, kind in IMAGE_FORMATS.items()}
# what Pillow's decoders raise on files that were made to break them
_UNDECODABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class BrokenImageError(DataError):
    """An image that is there but cannot be used: ``--missing skip`` leaves it out."""


@contextlib.contextmanager
def opened(content: bytes, what: str, formats: tuple[str, ...] | None = None) -> Iterator[Image.Image]:
    """Give the image of a file's bytes; its pixels are decoded when they are asked for inside.

    Args:
        content: the file.
        what: begins the sentence, for instance ``image a.jpg``.
        formats: Pillow's names of those that may be tried; None: all it knows.

    Raises:
        BrokenImageError: if the bytes are no image or it cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            # an image between the size that Pillow warns about and twice as much, which it refuses, is used
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=formats) as image:
                yield image
    except _UNDECODABLE as error:
        # Pillow's own words would show the address of a buffer
        reason = "no image format" if isinstance(error, UnidentifiedImageError) else error
        raise BrokenImageError(f"{what} cannot be decoded ({len(content)} bytes): {reason}") from error


def format_of(image: Image.Image) -> str:
    """Return the name of an image's format; an MPO, which phones write, is a JPEG with further pictures after it."""
    return "JPEG" if image.format == "MPO" else image.format or ""


def storable(content: bytes, what: str, *, reencode: bool) -> tuple[bytes, str]:
    """Return the bytes to store and their extension, after decoding the whole image.

    Args:
        content: the file.
        what: begins the sentence, for instance ``image a.gif``.
        reencode: turn GIF, BMP, TIFF and the like into JPEG of quality 95; JPEG, PNG and WEBP stay as they are.

    Raises:
        BrokenImageError: if it cannot be decoded, or is of another format and ``reencode`` is not set.
    """
    with opened(content, what, (*_EXTENSIONS, *_CONVERTIBLE)) as image:
        kind = format_of(image)
        if kind in _EXTENSIONS:
            # an eighth of the size is enough to meet a damage and saves most of a JPEG's decoding
            image.draft(image.mode, (max(image.width // 8, 1), max(image.height // 8, 1)))
            image.load()
            return content, _EXTENSIONS[kind]
        if not reencode:
            raise BrokenImageError(f"{what} is {kind}, expected JPEG, PNG or WEBP; `--reencode jpeg` converts it")
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=REENCODED_QUALITY)
        return buffer.getvalue(), "jpg"
