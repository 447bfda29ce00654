"""A training step rehearsed on tensors that have a size and no memory, to learn what it would compute and hold.

It takes seconds. The communication plan asks it for the operations of a step (:mod:`scinet.traffic`), and tests hold
the memory estimate, which is arithmetic (:mod:`scinet.stepmemory`), against it. Everything here runs the training's
own code on torch's fake tensors: the network, the teacher, the objective and the fusion; only the fusion's kernels are
replaced by an allocation of what they return and of the workspace they state.

Shapes: B images of this rank, G of the global batch, C classes, F features, D embedding.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from scinet.data.batch import Batch
from scinet.data.share import share_of
from scinet.distributed import Gathering, Ranks
from scinet.engine import parameter_groups, uses_bf16
from scinet.fusion.bank import Neighbours, plain_rows
from scinet.fusion.confidence import Fusion
from scinet.fusion.thresholds import DynamicThresholds
from scinet.memory import Subject
from scinet.model import features, heads
from scinet.model.backbone import Backbone, TextTower
from scinet.model.label_graph import text_correlation
from scinet.model.network import Network, Output
from scinet.model.teacher import Teacher
from scinet.objective import Aim, Look, Objective, Phase
from scinet.options import Memory, Method, Options, Weights
from scinet.stepmemory import StepMemory
from scinet.zoo.catalogue import Frame, build, sees_everyone
from scinet.zoo.objective import Sight, ZooObjective
from scinet.zoo.recipe import Everyone
from scinet_kernels import estimate as kernel_cost


@dataclass(frozen=True)
class Rehearsal(StepMemory):
    """What a step was seen to take.

    groups: elements of each of AdamW's groups; moved: of each parameter that gets a gradient. flop: operations of the
    matrix products of all of it.
    """

    groups: tuple[int, ...]
    moved: tuple[int, ...]
    flop: int


_rehearsed: weakref.WeakKeyDictionary[Subject, dict[tuple[int, str], Rehearsal]] = weakref.WeakKeyDictionary()


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operators return, while they live, and the operations of matrix products.

    torch's own counter of operations keeps alive what is computed again for backward.
    """

    def __init__(self) -> None:
        """Start at nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes: dict[int, int] = {}
        self.now = 0
        self.peak = 0
        self.flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.equal.default and isinstance(args[0], FakeTensor):
            return False  # torch.corrcoef asks whether it should warn; a fake tensor cannot say
        result = func(*args, **(kwargs or {}))
        self.flop += _flop(func, args, kwargs or {}, result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def peak_of(self, work: Callable[[], object]) -> int:
        """Return how far above its start a piece of work gets."""
        start = self.peak = self.now
        work()
        return self.peak - start

    def kept_by(self, work: Callable[[], object]) -> int:
        """Return what a piece of work's result keeps alive."""
        start = self.now
        result = work()
        kept = self.now - start
        del result
        return kept


def _flop(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    if func is torch.ops.aten.convolution_backward.default:  # torch counts grouped ones as if they were dense
        gradient, inputs, weight, *_, is_transposed, _, _, wanted = args
        forward = conv_flop_count(inputs.shape, weight.shape, gradient.shape, transposed=is_transposed)
        return int(sum(wanted[:2]) * forward)
    count = flop_registry.get(func._overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=result))


class _FakeText(TextTower):
    """Counts tokens for real: their number decides shapes."""

    def tokenize(self, texts: Any) -> Tensor:
        with _real():
            tokens = super().tokenize(texts)
        return torch.empty(tokens.shape, dtype=tokens.dtype)

    def count_words(self, context: str) -> int:
        with _real():
            return super().count_words(context)

    def embed(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self.forward(tokens).float()  # tokens without memory cannot be compared with earlier ones


class _FakeNetwork(Network):
    """Casts by replacing its tensors: torch swaps them in place, which fake ones do not allow."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _FakeNetwork:
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(fn(parameter.detach()), parameter.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else fn(buffer)
        return self


class _FakeFusion(Fusion):
    """Without its kernels, which need memory to work on."""

    stands_for = torch.device("cpu")  # whose kernels they would be
    flop = 0

    def _propagate(self, batch: Neighbours, rows: Neighbours, values: Tensor) -> Tensor:
        shape = (len(batch.embeddings), len(rows.embeddings), batch.embeddings.shape[1], values.shape[1])
        cost = kernel_cost("gaussian_propagate", shape, torch.float32, self.stands_for)
        self.flop += cost.flop
        workspace = values.new_empty(cost.workspace_bytes, dtype=torch.uint8)
        del workspace
        return values.new_empty(shape[0], shape[3])


@contextmanager
def _real() -> Iterator[None]:
    with unset_fake_temporarily(), torch.device("cpu"):
        yield


def rehearsed(options: Options, subject: Subject, world_size: int) -> Rehearsal:
    """Return a step's rehearsal, made once for all options that differ in what one rank's micro-batch does not see.

    Raises:
        ConfigError: as :func:`rehearse`.
    """
    train, found = options.train, _rehearsed.setdefault(subject, {})
    size = share_of(options, 0, world_size).micro_batch_size
    key = (size, repr(replace(options, deepspeed={}, train=replace(train, accumulation_steps=1))))
    if key not in found:
        found[key] = rehearse(
            options, subject.backbone, subject.class_names, world_size=world_size, device=subject.device
        )
    return found[key]


def rehearse(
    options: Options, backbone: Backbone, class_names: tuple[str, ...], *, world_size: int, device: torch.device
) -> Rehearsal:
    """Run one micro-batch of a rank without memory.

    Args:
        options: the whole configuration.
        backbone: towers, anywhere: they lend their shapes.
        class_names: C names.
        world_size: ranks that share the global batch.
        device: where the run would be, which decides precision and kernels; it need not be there.

    Raises:
        ConfigError: if the global batch does not divide, or the model's options do not fit the backbone.
    """
    num_classes = len(class_names)
    size = share_of(options, 0, world_size).micro_batch_size
    # the fakes pretend to be on the CPU anywhere: autograd asks a GPU's driver, and may find none
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with warnings.catch_warnings(), mode, torch.device("cpu"), LiveBytes() as live:
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        text = _FakeText(_faked(backbone.text._model, mode), backbone.text._tokenizer)
        towers = replace(backbone, image=_faked(backbone.image, mode), text=text)
        network = _FakeNetwork(towers, class_names, options.model, top_k=options.correlation.graph_top_k)
        teacher = Teacher(network, decay=0.5)
        own_teacher = _bytes([*teacher.network.parameters(), *teacher.network.buffers()])
        unseen = None
        if options.method is Method.vlpl:
            zero_shot = heads.untrained(options.model)
            unseen = _FakeNetwork(towers, class_names, zero_shot, top_k=options.correlation.graph_top_k)
            own_teacher += _bytes([*unseen.parameters(), *unseen.buffers()])
        # also where it changes nothing: views of copied fake weights would count as memory
        network.to(torch.bfloat16 if uses_bf16(options, device) else torch.float32)
        network.train()
        kept_text = live.kept_by(network.texts)
        is_fused = options.method is Method.scinet
        fusion = _build_fusion(options, backbone.width, num_classes, device) if is_fused else None
        batch = _batch(options, backbone, size, num_classes)
        step = _step(options, network, teacher, unseen, fusion, batch, live)
        return Rehearsal(
            layers=_layers(network),
            groups=tuple(
                sum(p.numel() for p in group["params"]) for group in parameter_groups(network, options.optimizer)
            ),
            moved=step.moved,
            element_size=next((p.element_size() for p in network.parameters() if p.requires_grad), 4),
            teacher=own_teacher,
            text=kept_text,
            student=max(0, step.kept - kept_text),
            gathered=step.gathered,
            fusion=step.fusion,
            backward=step.backward,
            flop=step.flop,
        )


def _faked(module: Any, mode: FakeTensorMode) -> Any:
    """Return a copy of a module whose tensors have no memory; nothing is copied on the way."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        with mode:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    return copy.deepcopy(module, memo)


def _batch(options: Options, backbone: Backbone, size: int, num_classes: int) -> Batch:
    num_views = len(options.method.views)
    side = options.model.image_size
    shape: tuple[int, ...] = (3, side, side)
    if options.data.cache_features:
        shape = features.shape(backbone.feature_width, options.data.cached_regions)
    labels = torch.zeros(size, num_classes, dtype=torch.int8)
    index = torch.zeros(size, dtype=torch.int64)
    inputs = torch.empty(num_views * size, *shape)
    return Batch(inputs, labels, labels, index, ("",) * size, torch.ones(size, dtype=torch.bool))


class _Peaks(NamedTuple):
    moved: tuple[int, ...]
    gathered: int
    kept: int
    fusion: int
    backward: int
    flop: int


def _step(
    options: Options,
    network: Network,
    teacher: Teacher,
    unseen: Network | None,
    fusion: _FakeFusion | None,
    batch: Batch,
    live: LiveBytes,
) -> _Peaks:
    """Take a step, gradients of weights apart, as :meth:`scinet.trainer.Trainer.train_step` does."""
    moved: list[int] = []

    def drop_gradient(parameter: Tensor) -> None:  # those of weights are counted by ZeRO stage, not here
        moved.append(parameter.numel())
        parameter.grad = None

    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop_gradient)  # type: ignore[no-untyped-call]
    aim = _aim(options, unseen, fusion, batch)
    start, before = live.now, live.flop
    live.peak = start
    look: Look | Sight | None = None
    if sees_everyone(options.method):
        look = _sighted(batch, options.train.global_batch_size)
    if fusion is not None:
        taught = teacher.forward(batch.inputs[: len(batch.observed)])
        look = _gathered(taught, batch, options.train.global_batch_size)
    looked = live.now - start
    output = network(batch.inputs)
    kept = live.now - start - looked
    loss = aim(output, batch, Phase(is_warm=True, epoch=1), float(len(batch.observed)), look, 0).loss
    fused, live.peak = live.peak - start - looked - kept, live.now
    torch.autograd.backward(loss)
    backward = live.peak - start - looked - kept
    flop = live.flop - before + (0 if fusion is None else fusion.flop)
    return _Peaks(tuple(moved), looked, kept, max(0, fused), max(0, backward), flop)


def _aim(options: Options, unseen: Network | None, fusion: _FakeFusion | None, batch: Batch) -> Aim:
    """Return the objective; tables of every sample's labels, and the thresholds' window, are counted apart."""
    cpu, num_classes = torch.device("cpu"), batch.observed.shape[1]
    ranks = Ranks(0, 1, cpu)
    if fusion is not None:
        thresholds = DynamicThresholds(num_classes, hard_k=options.loss.hard_k, window=1, device=cpu)
        return Objective(options, fusion, thresholds, ranks)
    frame = Frame(
        num_samples=1,
        num_classes=num_classes,
        num_positives=1.0,
        num_epochs=2,
        device=cpu,
        relation=lambda: torch.empty(num_classes, num_classes),
        cosines=None if unseen is None else lambda inputs: unseen(inputs).logits,
    )
    return ZooObjective(build(options, frame), ranks)


def _sighted(batch: Batch, rows: int) -> Sight:
    """Return the sight of a global batch whose rows have come from all ranks."""
    sight = Sight(
        [batch], lambda _: Output(batch.inputs, batch.inputs), Ranks(0, 1, torch.device("cpu")), has_gaps=False
    )
    shape = (rows, batch.observed.shape[1])
    index = torch.zeros(rows, dtype=torch.int64)
    sight._everyone = Everyone(torch.empty(shape), torch.zeros(shape, dtype=torch.int8), index)
    return sight


def _gathered(output: Output, batch: Batch, rows: int) -> Look:
    """Return a look whose rows have come from all ranks: [G, ...] of every column."""
    look = Look([output], [batch], Ranks(0, 1, torch.device("cpu")), has_gaps=False)
    mine = look.mine[0]
    if rows == len(mine.indices):
        return look
    width = sum(column[0].numel() * column.element_size() for column in mine)
    look._sent = Gathering(mine, torch.empty(rows, width, dtype=torch.uint8), None)
    len(look.everyone.indices)  # unpacks
    return look


def _build_fusion(options: Options, width: int, num_classes: int, device: torch.device) -> _FakeFusion:
    """Return the fusion with a full bank, and without the memory of past confidence, which is counted apart.

    Fitted weights stand at their prior, where no term costs anything; fixed ones cost about what those come to.
    """
    fusion = _FakeFusion(
        replace(options.fusion, memory=Memory.none, weights=Weights.fixed),
        options.correlation,
        text_correlation(torch.empty(num_classes, width)),
        width=width,
        num_samples=1,
        samples_per_epoch=1,
    )
    fusion.stands_for = device
    if options.fusion.enabled:
        rows, cells = options.fusion.bank_size, torch.zeros(options.fusion.bank_size, num_classes)
        indices = torch.zeros(rows, dtype=torch.int64)
        fusion.bank.append(plain_rows(torch.empty(rows, width), cells.to(torch.int8), cells, indices))
    return fusion


def _layers(network: Network) -> tuple[tuple[int, ...], ...]:
    """Return the elements of each module's own trainable parameters."""
    own = (
        tuple(p.numel() for p in module.parameters(recurse=False) if p.requires_grad) for module in network.modules()
    )
    return tuple(layer for layer in own if layer)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, each storage once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
