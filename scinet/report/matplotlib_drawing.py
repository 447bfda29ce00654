"""What the charts by matplotlib share, those of comparisons and sweeps; it is imported when the first one is drawn."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@contextmanager
def drawing(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """Give a figure of `width` x `height` inches with one pair of axes, under the settings of all of them."""
    with panels(width, height, 1, 1) as (figure, (axes,)):
        yield figure, axes


@contextmanager
def panels(width: float, height: float, num_rows: int, num_columns: int) -> Iterator[tuple[Figure, list[Axes]]]:
    """Give a figure with rows of axes that share their y, under the settings of all of them."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {  # matplotlib types every key by name since 3.11, and by str before
        "svg.fonttype": "none",
        "svg.hashsalt": "scinet",
        "font.size": 9,
        "legend.fontsize": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "text.parse_math": False,
        "axes.formatter.use_mathtext": False,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # matplotlib measures text in its own font; the reader's browser, which draws it, has the missing letters.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height))
        # The reader's font may run wider than the one that matplotlib lays out with: room for that at the edges.
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
        yield figure, list(figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).flat)


def to_svg(figure: Figure) -> bytes:
    """Return the figure as an SVG document without background (pages show it on white), date or address."""
    buffer = io.BytesIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return buffer.getvalue()
