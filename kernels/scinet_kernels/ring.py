"""Keys that go round the ranks: each holds its own shard and one that travels, and never the rows of all ranks.

Shapes: B queries of this rank, M keys of one shard, D embedding, C classes; W ranks.

In step k of W a rank holds the shard of the rank k places before it, and while it works on that shard hands it on to
the next rank. Forward: each shard gives a result and a log mass of its own, merged by log-sum-exp. Backward, with the
total result P and the total mass Z,

    T_ij = S_ij / Z_i (<G_i, c_j - P_i> + g_i)

asks nothing of the keys of other shards, so that each shard is differentiated alone. The gradients of its rows travel
with it and are home after W steps.

Source: ours; what a shard's T is, kernels.md section 2; when to go round at all, section 4.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from scinet_kernels.blocked_backward import Gradients, Needs
from scinet_kernels.gaussian import Arguments, implementations
from scinet_kernels.tiling import Problem


class Shard(NamedTuple):
    """One rank's keys [M, D], values [M, C], key weights [M] and key ids [M], contiguous; None on all ranks or none."""

    keys: Tensor
    values: Tensor | None
    key_weights: Tensor | None
    key_ids: Tensor | None


class Ring(NamedTuple):
    """The ranks of a process group in a circle.

    Attributes:
        group: process group.
        counts: [W] keys of each rank.

    """

    group: dist.ProcessGroup
    counts: list[int]

    def turn(self, own: Shard) -> Iterator[Shard]:
        """Yield every rank's shard, the own one first, then the previous rank's; each until the next. Collective.

        Args:
            own: this rank's shard; it must not change before the end.

        """
        world = len(self.counts)
        # two shards besides the own one: what is held, and what arrives meanwhile
        rooms = [_room(own, max(self.counts)) for _ in range(min(2, world - 1))]
        held = own
        for step in range(1, world):
            room = rooms[step % len(rooms)]
            arriving = self._start(held, _rows(room, self.counts[self._origin(step)]))
            yield held
            held = _shard(arriving.wait())
        yield held

    def hand_on(self, held: Sequence[Tensor | None], step: int) -> Sequence[Tensor | None]:
        """Send what this rank holds to the next one, and return what the previous one held. Collective.

        Args:
            held: contiguous tensors with the rows of one shard.
            step: the step in which what arrives is held; in step W it is the own again.

        """
        if len(self.counts) == 1:
            return held
        return self._start(held, _room(held, self.counts[self._origin(step)])).wait()

    def _origin(self, step: int) -> int:
        """Return whose shard this rank holds in a step."""
        return (dist.get_rank(self.group) - step) % len(self.counts)

    def _start(self, held: Sequence[Tensor | None], room: Sequence[Tensor | None]) -> "_Arriving":
        rank, world = dist.get_rank(self.group), len(self.counts)
        to, origin = (dist.get_global_rank(self.group, (rank + turn) % world) for turn in (1, -1))
        # both ends know the row counts, and leave out what is empty
        sends = [dist.P2POp(dist.isend, part, to, self.group) for part in held if part is not None and part.numel()]
        receives = [
            dist.P2POp(dist.irecv, part, origin, self.group) for part in room if part is not None and part.numel()
        ]
        operations = sends + receives
        return _Arriving(dist.batch_isend_irecv(operations) if operations else [], held, room)


class _Arriving(NamedTuple):
    """Tensors under way: what to wait for, what leaves and must stay alive as long, and where the others arrive."""

    works: Sequence[dist.Work]
    sent: Sequence[Tensor | None]
    room: Sequence[Tensor | None]

    def wait(self) -> Sequence[Tensor | None]:
        for work in self.works:
            work.wait()
        return self.room


def _room(like: Sequence[Tensor | None], rows: int) -> list[Tensor | None]:
    return [None if tensor is None else tensor.new_empty(rows, *tensor.shape[1:]) for tensor in like]


def _rows(tensors: Sequence[Tensor | None], count: int) -> list[Tensor | None]:
    return [None if tensor is None else tensor[:count] for tensor in tensors]


def merge(result: Tensor, log_mass: Tensor, part: Tensor, log_part: Tensor) -> tuple[Tensor, Tensor]:
    """Put together what two disjoint sets of keys give; rows without any key on either side stay zero, with mass -inf.

    Args:
        result: [B, C] over some keys.
        log_mass: [B] over the same.
        part: [B, C] over others.
        log_part: [B] over those.

    Returns:
        Result and log mass over both.

    """
    total = torch.logaddexp(log_mass, log_part)
    # the shares from the difference: they then sum to 1, however large the logarithms are and rounded
    ratio = (log_mass - log_part).masked_fill(total == -torch.inf, 0)[:, None].to(result.dtype)
    return torch.addcmul(result * ratio.sigmoid(), part, (-ratio).sigmoid()), total


def propagate(arguments: Arguments, ring: Ring) -> tuple[Tensor, Tensor]:
    """Return result [B, C] and log mass [B] over the keys of all ranks, without a graph. Collective.

    Args:
        arguments: with this rank's keys, values, weights and ids.
        ring: the ranks.

    """
    implementation, _ = implementations(arguments.backend)
    found: tuple[Tensor, Tensor] | None = None
    for step, shard in enumerate(ring.turn(_own_shard(arguments))):
        problem = _problem(arguments, shard, step)
        if found is not None:  # rows that lie near other shards need not be done with care on a far one
            problem = problem._replace(log_mass_elsewhere=found[1])
        part, log_part, _ = implementation.forward(problem)
        found = (part, log_part) if found is None else merge(*found, part, log_part)
    assert found is not None
    return found


def differentiate(
    arguments: Arguments, ring: Ring, result: Tensor, log_mass: Tensor, grad_result: Tensor, grad_log_mass: Tensor,
    needs: Needs,
) -> Gradients:  # fmt: skip
    """Differentiate :func:`propagate`: this rank's operands, by the sum of all ranks' losses. Collective.

    Args:
        arguments: as given to the forward.
        ring: the ranks.
        result: [B, C] of the forward.
        log_mass: [B] of the forward.
        grad_result: [B, C].
        grad_log_mass: [B].
        needs: which gradients are wanted, alike on all ranks but for the bandwidth; that of `queries` includes their
            part as keys where the queries are the keys.

    """
    forwards, backwards = implementations(arguments.backend)
    own, is_self = _own_shard(arguments), arguments.self_offset is not None
    # the queries are not the keys of a shard that travels: their part as keys comes back by itself
    needs_elsewhere = needs._replace(keys=needs.queries) if is_self else needs
    found = _sums(arguments, needs)
    carried: Sequence[Tensor | None] = _sums_of_shard(arguments, own, needs_elsewhere)
    for step, shard in enumerate(ring.turn(own)):
        problem = _problem(arguments, shard, step)
        mass = forwards.mass_of(problem, log_mass)
        wanted = needs if step == 0 else needs_elsewhere
        part = backwards.backward(problem, result, mass, grad_result, grad_log_mass, wanted)
        _add(found, [part.queries, part.bandwidth])
        _add(carried, [part.keys, part.values, part.key_weights])
        carried = ring.hand_on(carried, step + 1)
    queries, bandwidth = found
    keys, values, key_weights = carried
    if is_self and queries is not None and keys is not None:
        queries, keys = queries.add_(keys), None
    return Gradients(queries, keys, values, bandwidth, key_weights)


def _own_shard(arguments: Arguments) -> Shard:
    keys = arguments.queries if arguments.keys is None else arguments.keys
    operands = keys, arguments.values, arguments.key_weights, arguments.key_ids
    return _shard([None if operand is None else operand.detach().contiguous() for operand in operands])


def _shard(parts: Sequence[Tensor | None]) -> Shard:
    keys, values, key_weights, key_ids = parts
    assert keys is not None
    return Shard(keys, values, key_weights, key_ids)


def _problem(arguments: Arguments, shard: Shard, step: int) -> Problem:
    """Return this rank's queries against a shard: the own one in step 0, where the keys may be the queries."""
    if step == 0:
        return arguments.problem()
    return arguments._replace(**shard._asdict(), self_offset=None, exclude_self=False).problem()


def _dtypes(arguments: Arguments) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes, at least fp32, in which gradients of rows and of values are summed; alike on all ranks."""
    narrow = arguments.problem().dtype
    return narrow, narrow if arguments.values is None else torch.promote_types(arguments.values.dtype, narrow)


def _sums(arguments: Arguments, needs: Needs) -> list[Tensor | None]:
    """Return where the gradients of queries and bandwidth are summed."""
    narrow, _ = _dtypes(arguments)
    wanted = (needs.queries, arguments.queries), (needs.bandwidth, arguments.bandwidth)
    return [torch.zeros_like(operand, dtype=narrow) if need else None for need, operand in wanted]


def _sums_of_shard(arguments: Arguments, own: Shard, needs: Needs) -> list[Tensor | None]:
    """Return where the gradients of keys, values and key weights are summed."""
    narrow, wide = _dtypes(arguments)
    wanted = (
        (needs.keys, own.keys, narrow),
        (needs.values, own.values, wide),
        (needs.key_weights, own.key_weights, wide),
    )
    return [
        torch.zeros_like(operand, dtype=dtype) if need and operand is not None else None
        for need, operand, dtype in wanted
    ]


def _add(sums: Sequence[Tensor | None], parts: Sequence[Tensor | None]) -> None:
    for total, part in zip(sums, parts, strict=True):
        if total is not None and part is not None:
            total += part


class _Gaussian(torch.autograd.Function):
    """Not a custom operator as in `gaussian.py`: an operator's schema has no process group, nor has a graph."""

    @staticmethod
    def forward(ctx: Any, ring: Ring, *given: Any) -> tuple[Tensor, Tensor]:
        arguments = Arguments(*given)
        with torch.autocast(arguments.queries.device.type, enabled=False):
            result, log_mass = propagate(arguments, ring)
        ctx.save_for_backward(*arguments[:7], result, log_mass)
        ctx.ring, ctx.options = ring, arguments[7:]
        return result, log_mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_result: Tensor, grad_log_mass: Tensor) -> tuple[Tensor | None, ...]:
        *operands, result, log_mass = ctx.saved_tensors
        arguments = Arguments(*operands, *ctx.options)
        needs = Needs(*ctx.needs_input_grad[1:6])
        with torch.autocast(arguments.queries.device.type, enabled=False):
            found = differentiate(arguments, ctx.ring, result, log_mass, grad_result, grad_log_mass, needs)
        own = [
            part.to(operand.dtype) if need and part is not None else None
            for need, part, operand in zip(needs, found, operands[:5], strict=True)
        ]
        return (None, *own, *[None] * (len(Arguments._fields) - 5))


def gaussian(arguments: Arguments, ring: Ring) -> tuple[Tensor, Tensor]:
    """Run the operator over the keys of all ranks, and return result [B, C] and log mass [B]. Collective.

    Every rank must run the backward, whose gradients are those of the sum of all ranks' losses.

    Args:
        arguments: its operands and options, with this rank's rows.
        ring: the ranks.

    """
    result, log_mass = _Gaussian.apply(ring, *arguments)
    return result, log_mass
