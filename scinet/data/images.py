"""Opening the images that strangers made: what cannot be decoded is said in one sentence."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

from PIL import Image, UnidentifiedImageError

from scinet.errors import DataError


@contextlib.contextmanager
def opened(content: bytes, what: str) -> Iterator[Image.Image]:
    """Give the image of a file's bytes; its pixels are decoded when they are asked for inside.

    Args:
        content: the file.
        what: begins the sentence, for instance ``image a.jpg``.

    Raises:
        DataError: if the bytes are no image or it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow's own words would show the address of a buffer
        reason = "no image format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{what} cannot be decoded ({len(content)} bytes): {reason}") from error
