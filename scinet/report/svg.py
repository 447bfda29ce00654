"""Charts as SVG that stands in a page and takes its font and its ink, light or dark; no script, style sheet or id.

Lengths are pixels, downwards and to the right. Text stays text: the reader's fonts draw it, names in any script stay
legible, and every text is cleaned and escaped here, whoever wrote it.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from unicodedata import east_asian_width

import numpy as np

from scinet.report.rendering import COLOURS, chart_label

INK = "currentColor"
_GREY = "#bbbbbb"
_FONT = 12.0
_LINE = 18.0  # height of a line of the legend
_DASHES = ("", "7 3", "9 3 2 3", "2 3", "8 2 2 2 2 2", "12 3", "4 4")
_SHAPES = {  # around a point
    "circle": "m-3.2,0a3.2,3.2 0 1,0 6.4,0a3.2,3.2 0 1,0 -6.4,0",
    "square": "m-2.8,-2.8h5.6v5.6h-5.6z",
    "triangle": "m0,-3.8l3.6,6.3h-7.2z",
}
MARKERS = tuple(_SHAPES)
_LEVELS = 255  # of a heat map's colours; odd, so that the middle of a scale has one of its own


@dataclass(frozen=True)
class Look:
    """What tells a curve from the others, in colour and without: dashes, and a circle, square, triangle or nothing."""

    colour: str
    dash: str = ""
    marker: str = ""
    is_open: bool = False  # a marker that has the page's colour inside
    width: float = 2.0


def look(index: int, *, is_marked: bool) -> Look:
    """Return the look of a chart's curve by its place; no two of seven are alike."""
    marker = MARKERS[index % len(MARKERS)] if is_marked else ""
    return Look(COLOURS[index % len(COLOURS)], _DASHES[index % len(_DASHES)], marker)


@dataclass(frozen=True)
class Scale:
    """An axis: its ends, which differ, its ticks as (value, words), and its name."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    name: str = ""


def scale(
    values: np.ndarray, name: str = "", *, margin: float = 0.03, num_steps: int = 8, is_whole: bool = False
) -> Scale:
    """Return a scale that holds finite values, with round ticks.

    Args:
        values: any shape, at least one.
        name: of the axis.
        margin: share of their range to leave free at both ends.
        num_steps: most steps from tick to tick.
        is_whole: whether only whole numbers make sense.
    """
    # doubles end at 1.8e308: the range has to stay below that too
    low, high = (float(np.clip(end, -1e300, 1e300)) for end in (values.min(), values.max()))
    largest = max(abs(low), abs(high))
    is_range = high - low > 1e-9 * max(largest, 1e-290)
    pad = margin * (high - low) if is_range else 0.05 * largest if largest > 1e-290 else 0.5
    low, high = low - pad, high + pad
    return Scale(low, high, _ticks(low, high, num_steps, is_whole=is_whole), name)


def _ticks(low: float, high: float, num_steps: int, *, is_whole: bool = False) -> list[tuple[float, str]]:
    least = (high - low) / num_steps
    power = 10.0 ** math.floor(math.log10(least))
    step = next(step for step in (power, 2 * power, 2.5 * power, 5 * power, 10 * power) if step >= least * (1 - 1e-9))
    step = float(max(1, round(step))) if is_whole else step
    decimals = next((count for count in range(8) if math.isclose(step * 10**count, round(step * 10**count))), None)
    # the slack keeps an end that is a tick itself
    places = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    words = f",.{decimals}f" if decimals is not None and max(abs(low), abs(high)) < 1e11 else ".4g"
    return [(place * step, f"{place * step:{words}}".replace("-", "\N{MINUS SIGN}")) for place in places]


class Plot:
    """A pair of axes with a grid; what is added later lies on top, and the legend stands below."""

    def __init__(self, width: float, height: float, x: Scale, y: Scale) -> None:
        """Lay out the axes.

        Args:
            width: of the drawing.
            height: of the drawing without its legend.
            x: from left to right.
            y: from the bottom up.
        """
        self._width, self._height, self._x, self._y = width, height, x, y
        self._left = 14 + max((_length(words) for _, words in y.ticks), default=0) + (18 if y.name else 0)
        self._right, self._top, self._bottom = width - 18, 12, height - (46 if x.name else 26)
        self._legend: list[tuple[Look, str]] = []
        left, right, top, bottom = (_n(place) for place in (self._left, self._right, self._top, self._bottom))
        across = list(zip(self._across([value for value, _ in x.ticks]), (words for _, words in x.ticks), strict=True))
        up = list(zip(self._up([value for value, _ in y.ticks]), (words for _, words in y.ticks), strict=True))
        grid = "".join([f"M{_n(place)},{top}V{bottom}" for place, _ in across])
        grid += "".join([f"M{left},{_n(place)}H{right}" for place, _ in up])
        self._parts = [
            f'<path d="{grid}" fill="none" stroke="{INK}" stroke-opacity="0.15"/>',
            f'<path d="M{left},{top}V{bottom}H{right}" fill="none" stroke="{INK}"/>',
            *(_text(place, self._bottom + 17, words, "middle") for place, words in across),
            *(_text(self._left - 7, place + 0.35 * _FONT, words, "end") for place, words in up),
            _text((self._left + self._right) / 2, self._bottom + 37, x.name, "middle"),
            f'<g transform="translate(14,{_n((self._top + self._bottom) / 2)}) rotate(-90)">',
            _text(0, 0, y.name, "middle") + "</g>",
        ]

    def curve(self, x: np.ndarray, y: np.ndarray, look: Look, label: str = "") -> None:
        """Draw a line through points, [P] values each, marked where it has a marker, and name it in the legend."""
        points = list(zip(map(_n, self._across(x)), map(_n, self._up(y)), strict=True))
        self._draw("M" + "L".join([f"{across},{up}" for across, up in points]), points, look, label)

    def steps(
        self, edges: np.ndarray, heights: np.ndarray, look: Look, label: str = "", marks: Sequence[int] = ()
    ) -> None:
        """Draw a height from each edge to the next, and name the line in the legend.

        Args:
            edges: [P+1] values in rising order.
            heights: [P] values.
            look: of the line.
            label: in the legend; "" leaves it out.
            marks: those of the heights that are marked, at their right end.
        """
        (start, *ends), up = map(_n, self._across(edges)), list(map(_n, self._up(heights)))
        path = f"M{start}," + "V".join([f"{height}H{end}" for height, end in zip(up, ends, strict=True)])
        self._draw(path, [(ends[place], up[place]) for place in marks], look, label)

    def bars(self, x: np.ndarray, heights: np.ndarray, width: float, colour: str, label: str) -> None:
        """Draw bars from the bottom, [P] middles and [P] heights, all in the units of the axes."""
        left, right, up = self._across(x - width / 2), self._across(x + width / 2), self._up(heights)
        bars = zip(map(_n, left), map(_n, up), map(_n, right), strict=True)
        path = "".join([f"M{start},{_n(self._bottom)}V{top}H{end}V{_n(self._bottom)}z" for start, top, end in bars])
        self._parts.append(f'<path d="{path}" fill="{colour}"/>')
        self._legend.append((Look(colour, width=10), label))

    def ring(self, x: float, y: float, words: str) -> None:
        """Ring a point and write above it."""
        (across,), (up,) = self._across([x]), self._up([y])
        self._parts.append(
            f'<circle cx="{_n(across)}" cy="{_n(up)}" r="7" fill="none" stroke="{COLOURS[1]}" stroke-width="2"/>'
        )
        half = _length(words) / 2
        self._parts.append(_text(min(max(across, self._left + half + 4), self._right - half), up - 12, words, "middle"))

    def drawing(self) -> str:
        """Return the whole drawing."""
        parts, widest = list(self._parts), 52 + max((_length(label) for _, label in self._legend), default=0)
        columns = max(1, int((self._width - 16) // widest))
        rows = -(-len(self._legend) // columns)
        columns = -(-len(self._legend) // max(1, rows))  # as even as the rows allow
        start = max(8.0, (self._left + self._right - columns * widest) / 2)
        for place, (look, label) in enumerate(self._legend):
            # down the columns, so that what belongs together stays so
            x, y = start + place // rows * widest, self._height + 8 + place % rows * _LINE
            parts.append(_line(f"M{_n(x)},{_n(y)}h30", look) + _markers([(_n(x + 15), _n(y))], look))
            parts.append(_text(x + 37, y + 0.35 * _FONT, label))
        return _document(self._width, self._height + rows * _LINE + (4 if rows else 0), parts)

    def _draw(self, path: str, marked: Sequence[tuple[str, str]], look: Look, label: str) -> None:
        self._parts += [_line(path, look), _markers(marked, look)]
        if label:
            self._legend.append((look, label))

    def _across(self, x: np.ndarray | Sequence[float]) -> np.ndarray:
        share = (np.asarray(x) - self._x.low) / (self._x.high - self._x.low)
        return self._left + share * (self._right - self._left)

    def _up(self, y: np.ndarray | Sequence[float]) -> np.ndarray:
        share = (np.asarray(y) - self._y.low) / (self._y.high - self._y.low)
        return self._bottom - share * (self._bottom - self._top)


def heat_map(matrix: np.ndarray, names: Sequence[str], colours: Sequence[str], low: float, high: float) -> str:
    """Draw a matrix with every row and column named, and a bar of its colours; it grows with the number of classes.

    Args:
        matrix: [C,C] float; NaN is grey, what lies beyond the limits has the colour of the limit.
        names: C names, at least one.
        colours: hexadecimal, evenly from the lowest value to the highest.
        low: lower limit.
        high: upper limit, above the lower one.
    """
    # Much room for few classes, never less than a letter needs, and 80 fit the page's width.
    pitch = min(48.0, max(10.8, 730 / len(names)))
    font = min(13.0, max(8.7, 0.72 * pitch))
    names = [chart_label(name, limit=22) for name in names]
    left = 8 + max(_length(name, font) for name in names)
    side, right = pitch * len(names), left + pitch * len(names)
    shares = (matrix.astype(np.float64) - low) / (high - low)
    levels = np.where(np.isnan(shares), _LEVELS, np.nan_to_num(shares.clip(0, 1)) * (_LEVELS - 1) + 0.5).astype(
        np.uint8
    )
    middles = [place * pitch + pitch / 2 + 0.35 * font for place in range(len(names))]
    labels = "".join([_text(-5, middle, name) for middle, name in zip(middles, names, strict=True)])
    group = f'<g text-anchor="end" font-size="{_n(font)}" transform='
    ticks = _ticks(low, high, int(max(2, min(8, side // 24))))
    parts = [
        f'{group}"translate({_n(left)},6)">{labels}</g>',
        f'{group}"translate({_n(left)},{_n(6 + side)}) rotate(-90)">{labels}</g>',
        _image(levels, colours, left, 6, side, side),
        _image(np.arange(_LEVELS, dtype=np.uint8)[::-1, None], colours, right + 14, 6, 14, side),
        *(_text(right + 34, 6 + side * (high - value) / (high - low) + 0.35 * _FONT, words) for value, words in ticks),
    ]
    return _document(right + 42 + max(_length(words) for _, words in ticks), side + left + 6, parts)


def _image(levels: np.ndarray, colours: Sequence[str], x: float, y: float, width: float, height: float) -> str:
    """Return levels as an image, one pixel each: thousands of rectangles would be slow to show."""
    from PIL import Image

    stops = np.array([list(bytes.fromhex(colour[1:])) for colour in (*colours, _GREY)], dtype=np.float64)
    ramp = np.linspace(0, len(colours) - 1, _LEVELS)
    palette = [np.interp(ramp, range(len(colours)), stops[:-1, channel]) for channel in range(3)]
    image = Image.fromarray(levels)
    image.putpalette([*np.stack(palette, axis=1).round().astype(np.uint8).ravel().tolist(), *map(int, stops[-1])])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return (
        f'<image x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" preserveAspectRatio="none" '
        'image-rendering="optimizeSpeed" style="image-rendering:pixelated" '
        f'href="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"/>'
    )


def _line(path: str, look: Look) -> str:
    dash = f' stroke-dasharray="{look.dash}"' if look.dash else ""
    stroke = f'stroke="{look.colour}" stroke-width="{look.width}" stroke-linejoin="round"{dash}'
    return f'<path d="{path}" fill="none" {stroke}/>'


def _markers(points: Sequence[tuple[str, str]], look: Look) -> str:
    if not points or not look.marker:
        return ""
    shape = _SHAPES[look.marker]
    # the page's own colour, where it says one, fills an open marker
    fill = 'class="open" fill="#ffffff"' if look.is_open else f'fill="{look.colour}"'
    path = "".join([f"M{x},{y}{shape}" for x, y in points])
    return f'<path d="{path}" stroke="{look.colour}" stroke-width="1.4" {fill}/>'


def _text(x: float, y: float, words: str, anchor: str = "") -> str:
    place = f'<text x="{_n(x)}" y="{_n(y)}"' + (f' text-anchor="{anchor}"' if anchor else "")
    return f"{place}>{html.escape(chart_label(words, limit=60))}</text>" if words else ""


def _length(words: str, font: float = _FONT) -> float:
    """Return about how wide a text is; the reader's font is not known."""
    widths = (
        0.36 if letter in " .,:;'|!Iijlt" else 1.0 if letter in "mwMW@%" or east_asian_width(letter) in "WF" else 0.63
        for letter in words
    )
    return font * sum(widths)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _document(width: float, height: float, parts: Sequence[str]) -> str:
    size = f'width="{math.ceil(width)}" height="{math.ceil(height)}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {math.ceil(width)} {math.ceil(height)}" '
        f'font-size="{_n(_FONT)}" fill="{INK}">' + "".join(parts) + "</svg>"
    )
