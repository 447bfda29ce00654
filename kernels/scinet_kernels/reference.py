"""The definitions in plain PyTorch; any device, any floating-point dtype, differentiable any number of times.

Shapes: B queries, M keys, D embedding, C classes (columns of the values), K neighbours.
Formulas: method.md section 3; edge semantics: kernels.md section 5.5.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

DEFAULT_WORKSPACE_BYTES = 64 << 20


@dataclass(frozen=True)
class Pairs:
    """Which (query, key) pairs count, and how much.

    Attributes:
        own: [B] int64, the key row that is the query itself, where the keys contain the queries; else None.
        exclude_self: whether a query's own row is left out.
        query_ids: [B] int64 or None; pairs of equal id are left out.
        key_ids: [M] int64 or None.
        radius: largest Euclidean distance that counts, or None.
        neighbours: only so many nearest of the remaining keys count, or None.
        key_weights: [M] factors on the Gaussian weights, or None; a key whose factor is not positive is left out.

    """

    own: Tensor | None = None
    exclude_self: bool = False
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    radius: float | None = None
    neighbours: int | None = None
    key_weights: Tensor | None = None

    def rows(self, start: int, stop: int) -> "Pairs":
        """Restrict to the query rows [start, stop).

        Args:
            start: first query row.
            stop: one past the last query row.

        Returns:
            The same rules as seen from those rows.

        """
        return replace(
            self,
            own=None if self.own is None else self.own[start:stop],
            query_ids=None if self.query_ids is None else self.query_ids[start:stop],
        )


def squared_distance(queries: Tensor, keys: Tensor) -> Tensor:
    """Squared Euclidean distances by expansion; exact enough only for centred rows (kernels.md 5.4, rule 2).

    Args:
        queries: [B, D], centred.
        keys: [M, D], same dtype, centred by the same vector.

    Returns:
        [B, M], >= 0.

    """
    norms = queries.square().sum(1)[:, None] + keys.square().sum(1)[None, :]
    return torch.addmm(norms, queries, keys.T, alpha=-2).clamp_min(0)


def centre_of(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a point amid the keys with few digits, so that subtracting it from numbers with few digits is exact.

    Equal distances between such numbers then stay equal, and the lower index wins among them.

    Args:
        keys: [M, D].
        dtype: of the result.

    Returns:
        [D], detached: no distance depends on it. Keys that are not finite do not count.

    """
    mean = (keys.detach().sum(0, dtype=dtype) / max(1, keys.shape[0])).nan_to_num(0, 0, 0)
    mantissa, exponent = torch.frexp(mean)
    return torch.ldexp((mantissa * 64).round() / 64, exponent)


def centred(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract a common centre, which changes no distance and saves the expansion from cancellation.

    Args:
        queries: [B, D].
        keys: [M, D], same dtype.

    Returns:
        Both, shifted.

    """
    centre = centre_of(keys, keys.dtype)
    return queries - centre, keys - centre


def allowed_distance(queries: Tensor, keys: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Squared distances, and which pairs may count.

    Args:
        queries: [b, D] some query rows, centred.
        keys: [M, D] centred.
        pairs: the rules as seen from these rows.

    Returns:
        (squared distance [b, M], allowed [b, M] bool); `neighbours` is not applied yet.

    """
    squared = squared_distance(queries, keys)
    allowed = torch.ones_like(squared, dtype=torch.bool)
    if pairs.own is not None:
        own = pairs.own[:, None] == torch.arange(keys.shape[0], device=queries.device)
        squared = squared.masked_fill(own, 0)  # the expansion leaves rounding noise there
        if pairs.exclude_self:
            allowed &= ~own
    if pairs.query_ids is not None and pairs.key_ids is not None:
        allowed &= pairs.query_ids[:, None] != pairs.key_ids[None, :]
    if pairs.radius is not None:
        allowed &= squared <= pairs.radius**2
    if pairs.key_weights is not None:
        allowed &= pairs.key_weights > 0
    return squared, allowed


def log_weights(queries: Tensor, keys: Tensor, bandwidth: Tensor, pairs: Pairs) -> Tensor:
    """Logarithm of the Gaussian weight of each pair, -inf where the pair does not count.

    Args:
        queries: [b, D] some query rows, centred.
        keys: [M, D] centred.
        bandwidth: [b].
        pairs: the rules as seen from these rows.

    Returns:
        [b, M]: -|x - y|^2 / (2 s^2) + log key weight.

    """
    squared, allowed = allowed_distance(queries, keys, pairs)
    if pairs.neighbours is not None and pairs.neighbours < keys.shape[0]:
        # A stable sort keeps the lower index first among equals: repeatable.
        order = squared.detach().masked_fill(~allowed, torch.inf).sort(dim=1, stable=True).indices
        nearest = torch.zeros_like(allowed).scatter_(1, order[:, : pairs.neighbours], True)
        allowed &= nearest
    scale = bandwidth[:, None]
    logits = squared / scale / scale * -0.5  # not scale**2, which underflows first
    if pairs.key_weights is not None:
        positive = torch.where(pairs.key_weights > 0, pairs.key_weights, 1)  # log(0) would give 0/0 in the backward
        logits = logits + positive.log().to(logits.dtype)
    return logits.masked_fill(~allowed, -torch.inf)


def _empty_rows(logits: Tensor) -> Tensor:
    return (logits == -torch.inf).all(dim=1, keepdim=True)


def normalise(logits: Tensor) -> Tensor:
    """Softmax over each row; a row without any neighbour becomes zero, with zero gradient.

    Args:
        logits: [b, M] log weights.

    Returns:
        [b, M] row-stochastic, or zero rows.

    """
    empty = _empty_rows(logits)
    return logits.masked_fill(empty, 0).softmax(dim=1).masked_fill(empty, 0)


def log_mass(logits: Tensor) -> Tensor:
    """Logarithm of each row's sum of weights.

    Args:
        logits: [b, M] log weights.

    Returns:
        [b], -inf (zero gradient) for a row without any neighbour.

    """
    empty = _empty_rows(logits)
    return logits.masked_fill(empty, 0).logsumexp(dim=1).masked_fill(empty[:, 0], -torch.inf)


def pair_bytes(dtype: torch.dtype) -> int:
    """Bytes that one (query, key) pair holds at the peak of a chunk.

    Args:
        dtype: computation dtype.

    Returns:
        Four float temporaries, four masks, and the int64 index of a sort.

    """
    return 4 * dtype.itemsize + 4 + 8


def _map_rows(
    fold: Callable[[Tensor], Tensor],
    queries: Tensor,
    keys: Tensor,
    bandwidth: Tensor,
    pairs: Pairs,
    workspace_bytes: int,
) -> Tensor:
    """Apply `fold` to the log weights of a few query rows at a time and join the results.

    Between chunks nothing of size M per query is kept: the backward computes each chunk again.
    """
    queries, keys = centred(queries, keys)
    rows = max(1, workspace_bytes // (pair_bytes(queries.dtype) * max(1, keys.shape[0])))
    # An empty batch still makes one pass, so that its rank has a graph and joins the collectives of the backward.
    starts = range(0, max(1, queries.shape[0]), rows)

    def chunk(start: int) -> Tensor:
        stop = start + rows
        return fold(log_weights(queries[start:stop], keys, bandwidth[start:stop], pairs.rows(start, stop)))

    if len(starts) == 1:
        return chunk(0)
    if not torch.is_grad_enabled():
        return torch.cat([chunk(start) for start in starts])
    return torch.cat([checkpoint(chunk, start, use_reentrant=False, preserve_rng_state=False) for start in starts])


def propagate(
    queries: Tensor, keys: Tensor, values: Tensor, bandwidth: Tensor, pairs: Pairs, workspace_bytes: int
) -> Tensor:
    """Row-normalised Gaussian mean of the values: N_i = sum_j S~_ij c_j.

    Args:
        queries: [B, D].
        keys: [M, D], same dtype.
        values: [M, C], at least fp32.
        bandwidth: [B], same dtype as the queries.
        pairs: the rules.
        workspace_bytes: bound on what one chunk of query rows holds; one row is the least.

    Returns:
        [B, C] in the dtype of the values.

    """
    mixed = torch.promote_types(queries.dtype, values.dtype)
    wide = values.to(mixed)

    def fold(logits: Tensor) -> Tensor:
        return (normalise(logits).to(mixed) @ wide).to(values.dtype)

    return _map_rows(fold, queries, keys, bandwidth, pairs, workspace_bytes)


def mass(queries: Tensor, keys: Tensor, bandwidth: Tensor, pairs: Pairs, workspace_bytes: int) -> Tensor:
    """Logarithm of the sum of weights of each query.

    Args:
        queries: [B, D].
        keys: [M, D], same dtype.
        bandwidth: [B], same dtype.
        pairs: the rules.
        workspace_bytes: as in `propagate`.

    Returns:
        [B].

    """
    return _map_rows(log_mass, queries, keys, bandwidth, pairs, workspace_bytes)


def nearest(queries: Tensor, keys: Tensor, k: int, pairs: Pairs, workspace_bytes: int) -> tuple[Tensor, Tensor]:
    """Find the k nearest allowed keys of each query; the choice is held fixed in the backward.

    Args:
        queries: [B, D].
        keys: [M, D], same dtype.
        k: number of keys wanted.
        pairs: the rules.
        workspace_bytes: as in `propagate`.

    Returns:
        (index [B, k] int64, squared distance [B, k]), ascending, -1 and inf where there are fewer than k.

    """
    num_found = min(k, keys.shape[0])
    shifted_queries, shifted_keys = centred(queries.detach(), keys.detach())
    row_bytes = pair_bytes(queries.dtype) * keys.shape[0] + 2 * queries.dtype.itemsize * num_found * queries.shape[1]
    rows = max(1, workspace_bytes // max(1, row_bytes))
    indices, distances = [], []
    for start in range(0, max(1, queries.shape[0]), rows):
        stop = start + rows
        rough, allowed = allowed_distance(shifted_queries[start:stop], shifted_keys, pairs.rows(start, stop))
        order = rough.masked_fill(~allowed, torch.inf).sort(dim=1, stable=True).indices[:, :num_found]
        candidates = order.sort(dim=1).values  # by index, so that the stable sort below lets the lower one win a tie
        # The expansion is good enough to choose with; the distances themselves are taken by explicit difference.
        exact = (queries[start:stop, None, :] - keys[candidates]).square().sum(dim=2)
        exact = exact.masked_fill(~allowed.gather(1, candidates), torch.inf)
        by_distance = exact.detach().sort(dim=1, stable=True).indices
        exact = exact.gather(1, by_distance)
        distances.append(exact)
        indices.append(candidates.gather(1, by_distance).masked_fill(exact.detach() == torch.inf, -1))
    padding = (0, k - num_found)
    return (
        torch.nn.functional.pad(torch.cat(indices), padding, value=-1),
        torch.nn.functional.pad(torch.cat(distances), padding, value=torch.inf),
    )
