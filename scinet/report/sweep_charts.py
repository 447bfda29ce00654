"""Charts of a sweep's page: parallel coordinates, best so far, importance of each option."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from scinet.report.matplotlib_drawing import drawing, to_svg
from scinet.report.rendering import COLOURS, chart_label

_BEST, _DEFAULT = COLOURS[1], "#000000"


def parallel_chart(
    trials: Sequence[dict[str, Any]], keys: Sequence[str], log: Sequence[str], best: int
) -> bytes | None:
    """Draw each trial as a line over one axis an option and one of the hold-out mAP.

    Args:
        trials: of the search, with ``number``, ``parameters`` and ``holdout_map``; those without one are left out.
        keys: searched options.
        log: those on a logarithmic axis.
        best: number of the trial to draw thick.
    """
    shown = [trial for trial in trials if trial["holdout_map"] is not None]
    if len(shown) < 2:
        return None
    scales = [_Scale([trial["parameters"].get(key) for trial in shown], is_log=key in log) for key in keys]
    scales.append(_Scale([trial["holdout_map"] for trial in shown], is_log=False))
    with drawing(1.45 * len(scales) + 0.6, 4.2) as (figure, axes):
        import matplotlib

        colours = matplotlib.colormaps["viridis"]
        # the best on top of the others, the default on top of all
        for trial in sorted(shown, key=lambda trial: (trial["number"] == 0, trial["number"] == best)):
            values = [*(trial["parameters"].get(key) for key in keys), trial["holdout_map"]]
            heights = [scale.height(value) for scale, value in zip(scales, values, strict=True)]
            look: dict[str, Any] = {"color": colours(0.9 * heights[-1]), "linewidth": 1.0, "alpha": 0.75}
            if trial["number"] == best:
                look = {"color": _BEST, "linewidth": 2.6, "label": f"best (trial {best})"}
            if trial["number"] == 0:
                look = {"color": _DEFAULT, "linewidth": 1.8, "linestyle": "--", "label": "default"}
            axes.plot(range(len(scales)), heights, **look)
        for place, scale in enumerate(scales):
            axes.axvline(place, color="#888888", linewidth=0.8, zorder=0)
            for height, text in scale.marks:
                axes.text(place + 0.03, height, text, fontsize=7.5, va="center", color="#444444")
        names = [*(chart_label(key.rpartition(".")[2], limit=22) for key in keys), "hold-out mAP"]
        axes.set_xticks(range(len(scales)), names, fontsize=8, rotation=12)
        axes.set(yticks=[], xlim=(-0.1, len(scales) - 0.55), ylim=(-0.05, 1.05))
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        return to_svg(figure)


def progress_chart(trials: Sequence[dict[str, Any]]) -> bytes | None:
    """Draw the hold-out mAP of each trial of the search, and the best so far."""
    shown = [trial for trial in trials if trial["holdout_map"] is not None]
    if not shown:
        return None
    numbers = np.array([trial["number"] for trial in shown])
    values = np.array([trial["holdout_map"] for trial in shown])
    ended = np.array([trial["state"] == "completed" for trial in shown])
    with drawing(5.6, 3.3) as (figure, axes):
        best = np.maximum.accumulate(values)
        axes.step(numbers, best, where="post", color=COLOURS[0], linewidth=1.6, label="best so far")
        axes.plot(numbers[ended], values[ended], "o", color=COLOURS[1], markersize=5, label="trained to its end")
        hollow: dict[str, Any] = {"markerfacecolor": "white", "markersize": 5, "color": COLOURS[1]}
        axes.plot(numbers[~ended], values[~ended], "o", label="stopped early", **hollow)
        if shown[0]["number"] == 0:
            axes.axhline(values[0], color=_DEFAULT, linestyle="--", linewidth=0.9, label="default")
        axes.set(xlabel="trial", ylabel="hold-out mAP")
        axes.locator_params(axis="x", integer=True)
        axes.margins(y=0.1)
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        return to_svg(figure)


def importance_chart(importance: dict[str, float]) -> bytes | None:
    """Draw the share of each option in what sets the best trials apart."""
    if not importance:
        return None
    ranked = sorted(importance.items(), key=lambda item: item[1])
    with drawing(5.6, 0.42 * len(ranked) + 0.9) as (figure, axes):
        axes.barh([chart_label(key, limit=34) for key, _ in ranked], [share for _, share in ranked], color=COLOURS[0])
        axes.set(xlabel="importance (shares of 1)", xlim=(0, 1))
        axes.grid(visible=False, axis="y")
        return to_svg(figure)


class _Scale:
    """One axis: a value to its height from 0 to 1, and the marks beside it."""

    def __init__(self, values: Sequence[Any], *, is_log: bool) -> None:
        self._is_log = is_log
        numbers = [value for value in values if _is_number(value)]
        self._choices: list[str] | None = None
        if len(numbers) < len(values):
            self._choices = sorted({str(value) for value in values})
            self.marks = [(self._place(index), chart_label(name)) for index, name in enumerate(self._choices)]
            return
        self._low, self._high = self._bent(min(numbers)), self._bent(max(numbers))
        self.marks = [
            (height, f"{self._straight(self._low + height * (self._high - self._low)):.3g}") for height in (0, 0.5, 1)
        ]

    def height(self, value: Any) -> float:
        if self._choices is not None:
            return self._place(self._choices.index(str(value)))
        width = self._high - self._low
        return (self._bent(value) - self._low) / width if width else 0.5

    def _place(self, index: int) -> float:
        assert self._choices is not None
        return index / (len(self._choices) - 1) if len(self._choices) > 1 else 0.5

    def _bent(self, value: float) -> float:
        return math.log(max(value, 1e-12)) if self._is_log else value

    def _straight(self, value: float) -> float:
        return math.exp(value) if self._is_log else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
