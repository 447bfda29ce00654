"""Training steps to be timed, on random images in memory: SCINet's, its encoder's alone, open_clip's own.

Shapes: G samples of the batch, V = 3 views, C classes, D embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from scinet import config
from scinet.data.batch import Batch
from scinet.data.share import share_of
from scinet.data.views import VIEW_NAMES
from scinet.distributed import Ranks
from scinet.engine import uses_bf16
from scinet.errors import ConfigError
from scinet.fusion.bank import Neighbours, plain_rows
from scinet.materials import Materials
from scinet.model import backbone as model_backbone
from scinet.model.teacher import Teacher
from scinet.options import Head, Method, Options
from scinet.paths import cache_directory
from scinet.telemetry import MetricsLog, Silence
from scinet.trainer import Trainer

VIEWS = len(VIEW_NAMES)
_FORWARD, _BOTH = 1, 3  # a backward pass counts as two forward ones


@dataclass(frozen=True)
class Contestant:
    """A step to be timed; ``passes`` counts images, a forward pass as one and a backward pass as two."""

    name: str
    step: Callable[[], object]
    passes: int


def tuned(options: Options) -> Options:
    """Return the options with an image tower that trains on images, and the whole loss from the first step.

    Raises:
        ConfigError: if they do not train SCINet.
    """
    if options.method is not Method.scinet:
        raise ConfigError(f"method={options.method.value} has no step to compare: it needs method=scinet")
    if options.model.head is not Head.prompt:
        raise ConfigError(f"model.head={options.model.head.value} has no step to compare: it needs model.head=prompt")
    options = config.replace(options, data__cache_features=False, data__cached_regions=0)
    return config.replace(options, model__freeze_image=False, loss__warmup_fraction=0.0)


def scinet(options: Options, made: Materials, ranks: Ranks) -> Contestant:
    """Return the trainer's own step, on a bank that is full."""
    trainer = Trainer(options, made, ranks, MetricsLog(None), Silence())
    trainer.engine.train(True)
    micro = [_batch(options, made, ranks, number) for number in range(options.train.accumulation_steps)]
    size = options.train.global_batch_size
    if trainer.fusion is not None:
        rows, classes = options.fusion.bank_size, made.card.num_classes
        unit = nn.functional.normalize(torch.randn(rows, made.backbone.width), dim=1)
        labels = torch.randint(-1, 2, (rows, classes), dtype=torch.int8)
        full = plain_rows(unit, labels, torch.rand(rows, classes), torch.arange(rows) % made.card.num_indices)
        trainer.fusion.update(Neighbours(*(column.to(ranks.device) for column in full)))
    return Contestant("SCINet", lambda: trainer.train_step(micro, size), (VIEWS * _BOTH + _FORWARD) * size)


def _batch(options: Options, made: Materials, ranks: Ranks, number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    size = share_of(options, ranks.rank, ranks.world_size).micro_batch_size
    side, classes = options.model.image_size, made.card.num_classes
    images = torch.randn(VIEWS * size, 3, side, side, generator=generator)
    truth = torch.where(torch.rand(size, classes, generator=generator) < 0.1, 1, -1).to(torch.int8)
    is_known = torch.rand(size, classes, generator=generator) < options.data.known_ratio
    places = torch.arange(number * size, (number + 1) * size)
    index = (places * ranks.world_size + ranks.rank) % made.card.num_indices
    whole = torch.ones(size, dtype=torch.bool)
    return Batch(images, truth * is_known, truth, index, ("",) * size, whole).to(ranks.device)


def encoder(options: Options, made: Materials, ranks: Ranks) -> Contestant:
    """Return the passes of such a step and AdamW on what they train, and nothing else."""
    network = made.network(options).to(ranks.device)
    teacher = Teacher(network, decay=0.5).network
    if uses_bf16(options, ranks.device):
        network.to(torch.bfloat16)
    network.train()
    batches = [_batch(options, made, ranks, number) for number in range(options.train.accumulation_steps)]
    trained = [*network.prompter.parameters()] + ([] if network.image is None else [*network.image.parameters()])
    optimizer = torch.optim.AdamW(trained, lr=options.optimizer.learning_rate)

    def step() -> None:
        optimizer.zero_grad()
        for batch in batches:
            with torch.no_grad():
                teacher.embed(batch.inputs.chunk(VIEWS)[1])
                teacher.prompter(teacher.frozen.text)
        for batch in batches:
            image, text = network.embed(batch.inputs)[0], network.prompter(network.frozen.text)
            torch.autograd.backward(_product(image, text))
        optimizer.step()

    passes = (VIEWS * _BOTH + _FORWARD) * options.train.global_batch_size
    return Contestant("bare encoder, same passes and AdamW", step, passes)


def _product(image: Tensor, text: Tensor) -> Tensor:
    """Return a loss that costs next to nothing: the sum of the cosines, whose gradients do not underflow."""
    return (nn.functional.normalize(image.float(), dim=-1) @ nn.functional.normalize(text, dim=-1).T).sum()


def open_clip(options: Options, made: Materials, ranks: Ranks) -> Contestant:
    """Return open_clip's own training step: an epoch of one batch, with as many trained images and captions to them."""
    from open_clip import ClipLoss
    from open_clip_train.train import train_one_epoch

    model, tokenizer = model_backbone.open_clip_model(options.model, cache_directory(options.data.cache_dir))
    for name, parameter in model.named_parameters():  # the text tower is frozen, as in ours
        parameter.requires_grad_(name.startswith("visual.") or name == "logit_scale")
    model.to(ranks.device)
    cast(Any, model).output_dict = True  # as open_clip's own entry asks of it
    images = VIEWS * options.train.global_batch_size
    names = made.card.class_names
    captions = tokenizer([f"{options.model.context} {names[number % len(names)]}." for number in range(images)])
    pixels = torch.randn(images, 3, options.model.image_size, options.model.image_size)
    data = {"train": _OneBatch((pixels.to(ranks.device), captions.to(ranks.device)), images)}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=options.optimizer.learning_rate
    )
    arguments = SimpleNamespace(
        device=str(ranks.device),
        precision="amp_bf16" if uses_bf16(options, ranks.device) else "fp32",
        distill=False,
        accum_freq=1,
        skip_scheduler=True,
        grad_clip_norm=options.optimizer.gradient_clip or None,
        horovod=False,
        log_every_n_steps=1,
        world_size=1,
        rank=0,
        local_rank=0,
        log_local=False,
        batch_size=images,
        wandb=False,
    )
    loss = ClipLoss()
    logging.getLogger().setLevel(logging.WARNING)  # open_clip writes a line a step on the root logger

    def step() -> None:
        train_one_epoch(model, data, loss, 0, optimizer, None, None, None, arguments)

    return Contestant("open_clip, train_one_epoch", step, _BOTH * images)


@dataclass(frozen=True)
class _OneBatch:
    """What open_clip's loop wants of a data set, with one batch in it."""

    batch: tuple[Tensor, Tensor]
    num_samples: int
    num_batches: int = 1

    def set_epoch(self, epoch: int) -> None:
        """All epochs are alike."""

    @property
    def dataloader(self) -> Any:
        return self

    def __iter__(self) -> Any:
        return iter([self.batch])
