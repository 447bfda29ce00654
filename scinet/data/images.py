"""Opening the images that strangers made: what cannot be decoded is said in one sentence."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator

from PIL import Image, UnidentifiedImageError

from scinet.errors import DataError

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


@contextlib.contextmanager
def opened(content: bytes, what: str, formats: tuple[str, ...] | None = None) -> Iterator[Image.Image]:
    """Give the image of a file's bytes; its pixels are decoded when they are asked for inside.

    Args:
        content: the file.
        what: begins the sentence, for instance ``image a.jpg``.
        formats: Pillow's names of those that may be tried; None: all it knows.

    Raises:
        DataError: if the bytes are no image or it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            yield image
    except _UNDECODABLE as error:
        # Pillow's own words would show the address of a buffer
        reason = "no image format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{what} cannot be decoded ({len(content)} bytes): {reason}") from error
