"""Where weights and moments lie: which elements of each parameter this rank holds at each ZeRO stage.

The one place that knows how DeepSpeed partitions. A checkpoint made of parts loads at any other number of ranks and any
other stage, since a part says which elements it holds, not by which layout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Part:
    """Elements [start, start + numel) of a flattened tensor, as this rank holds them.

    ``is_shared``: every rank holds the same, the whole tensor. ``read`` gives the elements [numel], ``write`` replaces
    them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    numel: int
    is_shared: bool
    read: Callable[[], Tensor]
    write: Callable[[Tensor], None]


def whole(name: str, tensor: Tensor) -> Part:
    """Return a tensor that every rank holds as one part."""

    def write(values: Tensor) -> None:
        tensor.copy_(values.view(tensor.shape))

    return Part(
        name, tuple(tensor.shape), tensor.dtype, 0, tensor.numel(), True, lambda: tensor.detach().reshape(-1), write
    )


class Layout(ABC):
    """The weights (fp32) and AdamW's moments of an engine's trainable parameters."""

    def __init__(self, engine: Any) -> None:
        """Take a DeepSpeed engine."""
        self._engine = engine
        self._named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]

    @abstractmethod
    def _masters(self) -> list[Tensor]:
        """Return the tensors that AdamW updates."""

    @abstractmethod
    def _parts_of(self, name: str, parameter: nn.Parameter) -> Iterator[Part]:
        """Yield weight and moments of a parameter as far as this rank holds them."""

    @abstractmethod
    def refresh(self) -> None:
        """Let the weights that the network computes with follow the fp32 ones. Collective."""

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        return inner

    def parts(self) -> list[Part]:
        """Return this rank's parts, moments included."""
        self._make_moments()
        return [part for name, parameter in self._named for part in self._parts_of(name, parameter)]

    def _make_moments(self) -> None:
        """Do what AdamW does at its first step, where there has been none yet."""
        for master in self._masters():
            state = self._adamw.state[master]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state |= {key: torch.zeros_like(master) for key in MOMENTS}

    @property
    def num_updates(self) -> int:
        """AdamW's count of updates, by which it corrects the bias of its moments."""
        return max((int(self._adamw.state[master].get("step", 0)) for master in self._masters()), default=0)

    @num_updates.setter
    def num_updates(self, count: int) -> None:
        for master in self._masters():
            self._adamw.state[master]["step"].fill_(count)


class _Plain(Layout):
    """Stage 0: every rank holds everything; in bf16 DeepSpeed keeps fp32 copies beside the weights."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        optimizer = engine.optimizer
        self._copies: dict[nn.Parameter, Tensor] = {}
        if hasattr(optimizer, "fp32_groups"):
            for narrow, wide in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                self._copies |= dict(zip(narrow, wide, strict=True))
            self._undo_empty_step()

    def _undo_empty_step(self) -> None:
        """DeepSpeed begins with a step without gradients, which decays weights and counts in AdamW's correction."""
        self._adamw.state.clear()
        for narrow, wide in self._copies.items():
            wide.data.copy_(narrow)

    def _masters(self) -> list[Tensor]:
        return [self._copies.get(parameter, parameter) for _, parameter in self._named]

    def _parts_of(self, name: str, parameter: nn.Parameter) -> Iterator[Part]:
        master = self._copies.get(parameter, parameter)
        yield whole(f"{WEIGHT}/{name}", master.data)
        for key in MOMENTS:
            yield whole(f"{key}/{name}", self._adamw.state[master][key])

    def refresh(self) -> None:
        for parameter, master in self._copies.items():
            parameter.data.copy_(master.data)


class _Flat(Layout):
    """Stages 1 and 2: each rank holds a stretch of all parameters laid end to end."""

    def _masters(self) -> list[Tensor]:
        return list(self._engine.optimizer.single_partition_of_fp32_groups)

    def _make_moments(self) -> None:
        super()._make_moments()
        # DeepSpeed links them after the first group's first step, when the other groups have none
        for group, master in zip(self._engine.optimizer.bit16_groups, self._masters(), strict=True):
            for parameter in group:
                if parameter._hp_mapping is not None:
                    parameter._hp_mapping.set_optim_state_fragment(master, self._adamw.state[master])

    def _parts_of(self, name: str, parameter: nn.Parameter) -> Iterator[Part]:
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:  # other ranks hold all of it
            return
        address = mapping.lp_fragment_address
        for key in (WEIGHT, *MOMENTS):
            fragment = mapping.get_hp_fragment(None if key == WEIGHT else key)
            yield _stretch(f"{key}/{name}", parameter.shape, address.start, fragment)

    def refresh(self) -> None:
        self._engine.optimizer.update_lp_params()


def _stretch(name: str, shape: torch.Size, start: int, held: Tensor) -> Part:
    def write(values: Tensor) -> None:
        held.data.copy_(values)

    return Part(name, tuple(shape), held.dtype, start, held.numel(), False, held.detach, write)


class _Partitioned(Layout):
    """Stage 3: each rank holds an equal share of every parameter, the last one filled up."""

    def _masters(self) -> list[Tensor]:
        return list(self._engine.optimizer.fp32_partitioned_groups_flat)

    def _parts_of(self, name: str, parameter: nn.Parameter) -> Iterator[Part]:
        from deepspeed.utils import (
            safe_get_local_fp32_param,
            safe_get_local_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        yield _share(
            f"{WEIGHT}/{name}",
            parameter,
            lambda: safe_get_local_fp32_param(parameter),
            lambda values: safe_set_local_fp32_param(parameter, values),
        )
        for key in MOMENTS:
            yield _share(
                f"{key}/{name}",
                parameter,
                lambda key=key: safe_get_local_optimizer_state(parameter, key),  # type: ignore[misc]
                lambda values, key=key: safe_set_local_optimizer_state(parameter, values, key),  # type: ignore[misc]
            )

    def refresh(self) -> None:
        from deepspeed.utils import safe_get_local_fp32_param

        for _, parameter in self._named:
            weight: Tensor = safe_get_local_fp32_param(parameter)
            parameter.ds_tensor.data.copy_(weight)
        optimizer = self._engine.optimizer
        optimizer._partition_all_parameters()
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def held_parts(network: nn.Module) -> list[Part]:
    """Return the parameters of a network without optimiser, such as the teacher's, as far as this rank holds them."""
    parts = []
    for name, parameter in network.named_parameters():
        if hasattr(parameter, "ds_tensor"):
            share: Tensor = parameter.ds_tensor.data
            parts.append(_share(f"{WEIGHT}/{name}", parameter, share.detach, share.copy_))
        else:
            parts.append(whole(f"{WEIGHT}/{name}", parameter.data))
    return parts


def _share(name: str, parameter: Any, read: Callable[[], Tensor], write: Callable[[Tensor], Any]) -> Part:
    """Cut off what fills up the last rank's share."""
    from deepspeed import comm

    size = parameter.ds_tensor.ds_numel
    start = comm.get_rank() * size
    numel = max(0, min(size, parameter.ds_numel - start))

    def fill(values: Tensor) -> None:
        filled = read().clone()
        filled[:numel] = values
        write(filled)

    shape = tuple(parameter.ds_shape)
    return Part(name, shape, read().dtype, start, numel, False, lambda: read().detach()[:numel], fill)


def of_engine(engine: Any) -> Layout:
    """Return the layout of a DeepSpeed engine."""
    stage = int(engine.zero_optimization_stage())
    return (_Plain, _Flat, _Flat, _Partitioned)[stage](engine)
