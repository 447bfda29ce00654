"""The tiles of a Gaussian problem for the blocked path: which rows meet which, packed operands, masked exponents.

Shapes: B queries, M keys, D embedding, C classes (columns of the values); a tile is [b, m].

Points are measured from a centre amid the keys and, where one bandwidth serves all, in units of it. Two inner loops
walk the tiles: C on a CPU (`compiled_tiles.py`), and `Walk` in PyTorch everywhere else.

In `Walk` everything that a distance needs is a column of the operands: with `l = [x, -|x|^2/2, 1]` and
`r = [y, 1, -|y|^2/2]`, the product `l r'` is -|x - y|^2/2.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scinet_kernels.reference import Pairs, centre_of

# Rows and columns of a tile. More columns leave the shared cache; more rows make the products more efficient, but on
# few rows waste more of the diagonal's mirror image.
_TILE_ROWS, _TILE_ROWS_OF_MANY, _MANY_ROWS = 256, 512, 4096
_TILE_COLUMNS = 2048

_buffers = threading.local()


class Problem(NamedTuple):
    """Operands of one call.

    Attributes:
        queries: [B, D] floating point.
        keys: [M, D]; the very object `queries` where the queries are the keys.
        values: [M, C], or None: only the mass is wanted.
        bandwidth: [1] or [B].
        pairs: the rules, without `neighbours`.
        self_offset: the key row that is query row 0 itself, or None; says what `pairs.own` says.
        workspace_bytes: bound on tiles and packed operands.
        log_mass_elsewhere: [B] what other keys are known to weigh, or None; a row whose keys here are nothing beside
            those may be returned as one without keys.
        precision: "auto" or "ieee", of fp32 products on a GPU.

    """

    queries: Tensor
    keys: Tensor
    values: Tensor | None
    bandwidth: Tensor
    pairs: Pairs
    self_offset: int | None
    workspace_bytes: int
    log_mass_elsewhere: Tensor | None = None
    precision: str = "auto"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the exponents, at least fp32."""
        return torch.promote_types(torch.promote_types(self.queries.dtype, self.keys.dtype), torch.float32)

    @property
    def is_symmetric(self) -> bool:
        """Whether S is: the queries are the keys and share one bandwidth."""
        return self.queries is self.keys and self.bandwidth.numel() == 1


class Frame(NamedTuple):
    """How points are measured.

    Attributes:
        centre: [D], subtracted from every row.
        inverse: [1] or [B] 1 / bandwidth.
        unit: [1] factor on every row: `inverse`, or 1 where each query has its own bandwidth or a radius is to be
            compared with plain distances.
        is_scaled: whether `unit` is `inverse`, so that exponents need no more scaling.

    """

    centre: Tensor
    inverse: Tensor
    unit: Tensor
    is_scaled: bool

    def measured(self, rows: Tensor) -> Tensor:
        """Return rows [b, D] as the tiles see them."""
        return (rows - self.centre).mul_(self.unit)


def frame_of(problem: Problem) -> Frame:
    """Choose centre and unit of a problem."""
    inverse = problem.bandwidth.detach().to(problem.dtype).reciprocal()
    is_scaled = inverse.numel() == 1 and problem.pairs.radius is None
    centre = centre_of(problem.keys, problem.dtype)
    return Frame(centre, inverse, inverse if is_scaled else inverse.new_ones(1), is_scaled)


class Pull(NamedTuple):
    """`sum_j T_ij y_j` [rows, D] and `sum_j T_ij` [rows], which together make `sum_j T_ij (y_j - x_i)`."""

    towards: Tensor
    total: Tensor


class Sums(NamedTuple):
    """What the tiles of a backward add up to; None where it is not wanted. `T` includes the 1 / s^2 not in the points.

    Attributes:
        received: [M, C + 1] sum_i S_ij signal_i.
        rows: pull at the queries; in a symmetric problem also their part as keys.
        columns: pull at the keys of a problem that is not symmetric.
        spread: [B] sum_j T_ij |y_j|^2.

    """

    received: Tensor | None
    rows: Pull | None
    columns: Pull | None
    spread: Tensor | None


@dataclass(frozen=True)
class Tile:
    """Query rows [row, row_end) against key rows [first, column_end).

    In a symmetric walk the columns from `mirror` on stand for their transpose too.
    """

    row: int
    row_end: int
    first: int
    column_end: int
    mirror: int

    @property
    def rows(self) -> slice:
        """The query rows."""
        return slice(self.row, self.row_end)

    @property
    def columns(self) -> slice:
        """The key rows."""
        return slice(self.first, self.column_end)

    @property
    def mirrored(self) -> slice:
        """The key rows that are query rows of the transpose; often empty."""
        return slice(self.mirror, self.column_end)


class Walk:
    """The tiles of a problem, with operands packed into a workspace that every call of this thread reuses."""

    def __init__(self, problem: Problem, frame: Frame, num_tiles: int) -> None:
        """Take the workspace.

        Args:
            problem: the operands.
            frame: its frame.
            num_tiles: buffers of a tile's size; the first holds the exponents.

        """
        self.problem = problem
        dtype, width = problem.dtype, problem.queries.shape[1] + 2
        self.frame = frame
        self._matches = _Matches(problem.pairs)
        inner, outer = self._shape = _tile_shape(problem, width, num_tiles)
        sizes = [inner * width, outer * width, *[inner * outer] * num_tiles]
        left, right, *self._tiles = carve(sizes, dtype, problem.queries.device)
        self._left, self._right = left.view(-1, width), right.view(-1, width)

    def __iter__(self) -> Iterator[tuple[Tile, Tensor, Tensor, Tensor]]:
        """Yield each tile with its packed rows l, r and its exponents, -inf where a pair does not count."""
        num_rows, num_columns = len(self.problem.queries), len(self.problem.keys)
        inner, outer = self._shape
        is_symmetric = self.problem.is_symmetric
        for column in range(0, num_columns, outer):
            column_end = min(column + outer, num_columns)
            right = self._pack(self._right, self.problem.keys, slice(column, column_end), is_left=False)
            for row in range(0, column_end if is_symmetric else num_rows, inner):
                row_end = min(row + inner, num_rows)
                first = max(column, row) if is_symmetric else column
                mirror = max(column, row_end if row >= column else 0) if is_symmetric else column_end
                tile = Tile(row, row_end, first, column_end, mirror)
                left = self._pack(self._left, self.problem.queries, tile.rows, is_left=True)
                exponents = torch.mm(left, right[first - column :].T, out=self.buffer(0, tile))
                exponents.clamp_(max=0)  # rounding: a narrow bandwidth would make it an enormous weight
                self._mask(exponents, tile)
                yield tile, left, right[first - column :], exponents

    def buffer(self, number: int, tile: Tile) -> Tensor:
        """Return one of the workspace's tiles [b, m], to be overwritten."""
        rows, columns = tile.row_end - tile.row, tile.column_end - tile.first
        return self._tiles[number][: rows * columns].view(rows, columns)

    def own(self, cells: Tensor, tile: Tile) -> Tensor | None:
        """Return the view of a tile's cells in which queries meet themselves, or None."""
        if self.problem.self_offset is None:
            return None
        shift = tile.row + self.problem.self_offset - tile.first
        return cells.diagonal(shift) if -cells.shape[0] < shift < cells.shape[1] else None

    def scale_rows(self, cells: Tensor, rows: slice) -> None:
        """Divide rows by the squared bandwidth that is not in the points; in two steps: the square overflows first."""
        if not self.frame.is_scaled:
            inverse = self.frame.inverse if self.frame.inverse.numel() == 1 else self.frame.inverse[rows, None]
            cells.mul_(inverse).mul_(inverse)

    def _pack(self, buffer: Tensor, source: Tensor, rows: slice, *, is_left: bool) -> Tensor:
        packed = buffer[: rows.stop - rows.start]
        width = packed.shape[1] - 2
        vectors = torch.sub(source[rows], self.frame.centre, out=packed[:, :width])
        if self.frame.is_scaled:
            vectors.mul_(self.frame.unit)
        packed[:, width + 1 - is_left] = torch.linalg.vecdot(vectors, vectors).mul_(-0.5)
        packed[:, width + is_left] = 1
        return packed

    def _mask(self, exponents: Tensor, tile: Tile) -> None:
        pairs = self.problem.pairs
        if pairs.radius is not None:
            exponents.masked_fill_(exponents < -0.5 * pairs.radius**2, -torch.inf)
        self.scale_rows(exponents, tile.rows)
        own = self.own(exponents, tile)
        if own is not None:  # the expansion leaves rounding noise where the distance is 0
            own.fill_(-torch.inf if pairs.exclude_self else 0)
        self._matches.mask(exponents, tile)


class _Matches:
    """Pairs of equal id, found by sorting: they are few, and comparing all pairs would be another pass."""

    def __init__(self, pairs: Pairs) -> None:
        self._ids: tuple[Tensor, Tensor] | None = None
        if pairs.query_ids is None or pairs.key_ids is None:
            return
        self._ids = pairs.query_ids, pairs.key_ids
        ordered, self._order = pairs.key_ids.sort(stable=True)
        queries = pairs.query_ids.contiguous()
        self._starts = torch.searchsorted(ordered, queries)
        self._counts = torch.searchsorted(ordered, queries, right=True) - self._starts

    def mask(self, exponents: Tensor, tile: Tile) -> None:
        """Set the exponents of equal ids to -inf."""
        if self._ids is None:
            return
        starts, counts = self._starts[tile.rows], self._counts[tile.rows]
        total = int(counts.sum())
        if total > exponents.numel() // 8:
            queries, keys = self._ids
            exponents.masked_fill_(queries[tile.rows, None] == keys[None, tile.columns], -torch.inf)
            return
        rows = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        within = torch.arange(total, device=counts.device) - (counts.cumsum(0) - counts)[rows]
        columns = self._order[starts[rows] + within] - tile.first
        is_here = (columns >= 0) & (columns < exponents.shape[1])
        exponents[rows[is_here], columns[is_here]] = -torch.inf


def _tile_shape(problem: Problem, width: int, num_tiles: int) -> tuple[int, int]:
    """Return rows and columns of a tile, such that the workspace holds it with its packed operands."""
    budget = problem.workspace_bytes // problem.dtype.itemsize
    num_rows, num_columns = len(problem.queries), len(problem.keys)
    inner = max(1, min(num_rows, _TILE_ROWS if num_rows < _MANY_ROWS else _TILE_ROWS_OF_MANY))
    outer = max(1, min(num_columns, _TILE_COLUMNS))
    while inner * outer > 1 and num_tiles * inner * outer + (inner + outer) * width > budget:
        inner, outer = (inner, -(-outer // 2)) if outer > inner else (-(-inner // 2), outer)
    if outer < num_columns:  # a block of rows must not straddle two blocks of columns
        inner = min(inner, outer)
        outer -= outer % inner
    return inner, outer


def carve(sizes: list[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Cut pieces out of one buffer; on a CPU this thread keeps it, since fresh memory costs more than small products.

    A GPU's allocator keeps freed memory itself, and knows which stream still uses it.
    """
    padded = [-(-size // 16) * 16 for size in sizes]  # 64 bytes, so that every piece is aligned
    kept: dict[torch.dtype, Tensor] = _buffers.__dict__.setdefault("kept", {})
    buffer = kept.get(dtype) if device.type == "cpu" else None
    if buffer is None or buffer.numel() < sum(padded):
        with torch.inference_mode(False):  # a buffer made within could not be written outside
            buffer = torch.empty(sum(padded), dtype=dtype, device=device)
    if device.type == "cpu":
        kept[dtype] = buffer
    pieces = torch.split(buffer[: sum(padded)], padded)
    return [piece[:size] for piece, size in zip(pieces, sizes, strict=True)]
