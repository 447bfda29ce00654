"""Runs as a table that fits the terminal; of a single run, its losses and ranks too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from scinet.texttable import printable
from scinet.top.watch import Look, State

_LONGEST_NAME = 40
_SHORTEST_NAME = 8
_BAR_WIDTH = 12
_MOST_RANKS = 64
_UNKNOWN = "-"
_COLOURS = {
    State.starting: "cyan",
    State.training: "green",
    State.evaluating: "cyan",
    State.stalled: "bold red",
    State.finished: "dim",
    State.ended: "yellow",
}


@dataclass(frozen=True)
class _Column:
    """A heading, what it shows of a run, and when it gives way on a narrow terminal: the highest number first."""

    title: str
    show: Callable[[Look], Text]
    gives_way: int = 0
    is_left: bool = False


def screen(looks: Sequence[Look], others: Sequence[str], console: Console) -> RenderableType:
    """Return what is to be shown.

    Args:
        looks: one a run.
        others: sentences about what could not be shown.
        console: whose width is to be kept to, if it is a terminal.
    """
    parts: list[RenderableType] = [_table(looks, console.width if console.is_terminal else None)]
    if len(looks) == 1:
        parts += [part for part in (_losses(looks[0]), _ranks(looks[0])) if part is not None]
    parts += [Text(other, style="dim") for other in others]
    return Group(*parts)


def _table(looks: Sequence[Look], width: int | None) -> Table:
    columns = list(_COLUMNS)
    cells = {column.title: [column.show(look) for look in looks] for column in columns}

    def wide(column: _Column) -> int:
        return max(cell_len(column.title), *(cell.cell_len for cell in cells[column.title])) + 2

    widths = {column.title: wide(column) for column in columns}
    if width is not None:
        shortest = min(widths["run"], _SHORTEST_NAME + 2)
        while len(columns) > 2 and shortest + sum(widths[column.title] for column in columns[1:]) > width:
            columns.remove(max(columns[1:], key=lambda column: column.gives_way))
        left = width - sum(widths[column.title] for column in columns[1:])
        widths["run"] = max(shortest, min(widths["run"], left))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in columns:
        justify: JustifyMethod = "left" if column.is_left else "right"
        exact = widths[column.title] - 2
        table.add_column(column.title, justify=justify, no_wrap=True, overflow="ellipsis", width=exact)
    for row in zip(*(cells[column.title] for column in columns), strict=True):
        table.add_row(*row)
    return table


def _losses(look: Look) -> Text | None:
    if not look.parts:
        return None
    shown = "  ".join(f"{printable(name, limit=_LONGEST_NAME)} {value:.4f}" for name, value in look.parts.items())
    return Text(f"loss: {shown}\n")


def _ranks(look: Look) -> Table | None:
    if not look.ranks:
        return None
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for title in ("rank", "", "steps", "data wait", "memory"):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    table.add_column("host", no_wrap=True, overflow="ellipsis")
    # those that are missing are what one looks for
    shown = sorted(look.ranks, key=lambda rank: rank.is_up)[:_MOST_RANKS]
    for rank in sorted(shown, key=look.ranks.index):
        table.add_row(
            _safe(rank.rank, _SHORTEST_NAME),
            Text("up", style="green") if rank.is_up else Text("silent", style="bold red"),
            Text(_count(rank.steps)),
            Text(_percent(rank.wait_share)),
            Text(_bytes(rank.memory_bytes)),
            _safe(rank.host),
        )
    return table


def _safe(name: str, limit: int = _LONGEST_NAME) -> Text:
    """Return a stranger's word, which neither the terminal nor rich takes for more than that."""
    return Text(printable(name, limit=limit))


def _state(look: Look) -> Text:
    return Text(look.state.value, style=_COLOURS[look.state])


def _steps(look: Look) -> Text:
    return Text(f"{look.step}/{'?' if look.total_steps is None else look.total_steps}")


def _bar(look: Look) -> Text:
    if not look.total_steps:
        return Text(" " * _BAR_WIDTH)
    done = round(_BAR_WIDTH * min(1.0, look.step / look.total_steps))
    return Text.assemble(("━" * done, _COLOURS[look.state]), ("╌" * (_BAR_WIDTH - done), "dim"))


def _maps(look: Look) -> Text:
    if look.last_map is None or look.best_map is None:
        return Text(_UNKNOWN)
    return Text(f"{look.last_map:.1f}/{look.best_map:.1f}")


def _ranks_up(look: Look) -> Text:
    if not look.ranks:
        return Text(_UNKNOWN)
    total = max(look.num_ranks or 0, len(look.ranks))
    return Text(f"{look.ranks_up}/{total}", style="" if look.ranks_up == total else "bold red")


def _time(seconds: float | None) -> str:
    if seconds is None or seconds >= 1e8:
        return _UNKNOWN
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _count(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.0f}"


def _speed(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _percent(share: float | None) -> str:
    return _UNKNOWN if share is None else f"{share:.0%}"


def _bytes(value: float | None) -> str:
    if value is None:
        return _UNKNOWN
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


_COLUMNS = (
    _Column("run", lambda look: _safe(look.name), is_left=True),
    _Column("state", _state, is_left=True),
    _Column("step", _steps, gives_way=1),
    _Column("", _bar, gives_way=9, is_left=True),
    _Column("samples/s", lambda look: Text(_speed(look.samples_per_second)), gives_way=3),
    _Column("loss", lambda look: Text(_UNKNOWN if look.loss is None else f"{look.loss:.4g}"), gives_way=4),
    _Column("mAP/best", _maps, gives_way=5),
    _Column("eta", lambda look: Text(_time(look.eta_s)), gives_way=6),
    _Column("ranks", _ranks_up, gives_way=2),
    _Column("memory", lambda look: Text(_bytes(look.memory_bytes)), gives_way=8),
    _Column("wait", lambda look: Text(_percent(look.wait_share)), gives_way=7),
)
