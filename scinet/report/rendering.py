"""What the pages share: charts and photographs as `data:` addresses, templates that escape, a file written whole."""

from __future__ import annotations

import base64
import io
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAX_IMAGE_SIDE = 440
_NO_CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160)), "�")
_logger = logging.getLogger(__name__)

# Okabe and Ito's palette, told apart by colour-blind readers; its black is the ink of the page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "currentColor")


def chart_label(name: str, *, limit: int = 26) -> str:
    """Return `name` in at most `limit` characters, without those that XML forbids or that do not print."""
    printable = "".join(letter if letter.isprintable() else "\ufffd" for letter in name)
    return printable if len(printable) <= limit else printable[: limit - 1] + "…"


@dataclass(frozen=True)
class Chart:
    """A picture of figures, with the words for those who do not see it.

    A `str` is a drawing of `scinet.report.svg` and stands in the page itself. Bytes are a document of matplotlib's and
    become an image, since its style and its ids would reach beyond it.
    """

    title: str
    alt: str
    svg: str | bytes
    is_wide: bool = False

    @property
    def source(self) -> str | None:
        """The `data:` address of an image."""
        if isinstance(self.svg, str):
            return None
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode()

    def write(self, path: Path) -> None:
        """Write the drawing as a file of its own, on white, since a reader's page may be dark."""
        svg = self.svg if isinstance(self.svg, str) else self.svg.decode()
        write_page(path, svg.replace("<svg ", '<svg style="background:#ffffff" ', 1))


def chart(svg: str | bytes | None, title: str, alt: str, *, is_wide: bool = False) -> Chart | None:
    """Return a drawing as a chart of a page, None where nothing was drawn."""
    return None if svg is None else Chart(title, alt, svg, is_wide)


def image_source(content: bytes, name: str) -> str | None:
    """Return a small JPEG made anew, so without position or other hidden data, as a data: address; None if broken."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")) as image:
            # Lets the JPEG decoder itself shrink a large photograph, many times faster than decoding all of it.
            image.draft("RGB", (2 * _MAX_IMAGE_SIDE, 2 * _MAX_IMAGE_SIDE))
            small = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        _logger.warning("report: image %r cannot be decoded (%s), its place says so", name, error)
        return None
    small.thumbnail((_MAX_IMAGE_SIDE, _MAX_IMAGE_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def render(template: str, **content: Any) -> str:
    """Return a page of `scinet/report`; every value is escaped, and control characters are replaced."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("scinet", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value.translate(_NO_CONTROLS) if isinstance(value, str) else value,
    )
    return environment.get_template(template).render(content)


def write_page(path: Path, page: str) -> None:
    """Write a page, or a drawing, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # File names may hold bytes that are no UTF-8 (lone surrogates in Python): a question mark stands for each.
        temporary.write_bytes(page.encode("utf-8", errors="replace"))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
