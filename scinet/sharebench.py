"""``scinet bench share``: the fusion's share of a training step's time, beside that of the encoders.

Shapes: G rows of the global batch, M of the bank, C classes, D embedding, n images a view that are really encoded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scinet import pairing, preflight
from scinet.assembling import num_regions
from scinet.data.card import DataCard
from scinet.engine import uses_bf16
from scinet.errors import ConfigError
from scinet.fusion.bank import Neighbours, blank
from scinet.fusion.confidence import Fusion
from scinet.model import backbone as model_backbone
from scinet.model.label_graph import text_correlation
from scinet.model.network import Network
from scinet.model.teacher import Teacher
from scinet.options import Head, Method, Options, Profile
from scinet.paths import cache_directory

_NUM_VIEWS = 3
_IMAGE_ENCODER = "image encoder"


@dataclass(frozen=True)
class Sizes:
    """G, M, n, and how often each part is timed."""

    batch: int
    bank: int
    images: int
    repeats: int


@dataclass(frozen=True)
class Part:
    """A part of the step: what runs, and how often it would run in a step of G samples."""

    name: str
    run: Callable[[], None]
    times_a_step: float = 1.0


def report(options: Options, sizes: Sizes, device_name: str, say: Callable[[str], None]) -> str:
    """Time the parts, taking turns, and return a table with their shares.

    Args:
        options: names backbone, data set and fusion; data and bank are random.
        sizes: what is timed.
        device_name: "cpu" or "cuda".
        say: told what is being measured.

    Raises:
        ConfigError: if the configuration has no fusion to time, or data or weights cannot be had.
    """
    if options.model.head is not Head.prompt:
        raise ConfigError(f"model.head={options.model.head.value} has no share to time: it needs model.head=prompt")
    if options.method is not Method.scinet or options.profile is Profile.release or not options.fusion.enabled:
        raise ConfigError(
            "there is no fusion to time: it needs method=scinet, profile=paper and fusion.enabled=true, found "
            f"method={options.method.value}, profile={options.profile.value}, "
            f"fusion.enabled={str(options.fusion.enabled).lower()}"
        )
    device = torch.device(device_name)
    card = preflight.check(options)
    backbone = model_backbone.load(options.model, cache_directory(options.data.cache_dir))
    backbone.image.to(device)
    backbone.text.to(device)
    torch.manual_seed(options.seed)
    network = Network(backbone, card.class_names, options.model, top_k=options.correlation.graph_top_k).to(device)
    parts = [
        *_fusion_parts(options, network, backbone.width, card, sizes, device),
        *_encoder_parts(options, network, sizes, device),
    ]
    seconds = _times(parts, sizes.repeats, device, say)
    title = (
        f"A step of {sizes.batch} samples with a bank of {sizes.bank}: {card.num_classes} classes of {card.name}, "
        f"{backbone.name} towers (width {backbone.width}), {device_name}, threads: {torch.get_num_threads()}.\n"
    )
    return title + _explained(options, sizes) + _table(parts, seconds, spares_images=options.data.cache_features)


def _fusion_parts(
    options: Options, network: Network, width: int, card: DataCard, sizes: Sizes, device: torch.device
) -> list[Part]:
    text = text_correlation(network.class_text)
    fusion = Fusion(
        dataclasses.replace(options.fusion, bank_size=sizes.bank),
        options.correlation,
        text,
        width=width,
        num_regions=num_regions(options),
        num_samples=sizes.bank + sizes.batch,
        samples_per_epoch=card.split("train").num_samples,
    )
    if sizes.bank:
        fusion.update(
            _random_rows(0, sizes.bank, width, len(text), fusion.num_regions, options.data.known_ratio, device)
        )
    known = options.data.known_ratio
    batch = _random_rows(sizes.bank, sizes.batch, width, len(text), fusion.num_regions, known, device)
    differentiates = options.fusion.differentiable

    def combine() -> None:
        mine = batch._replace(embeddings=batch.embeddings.detach().requires_grad_(differentiates))
        with torch.set_grad_enabled(differentiates):
            unified = fusion.combine(mine, batch.confidence, batch).unified
        _differentiate(unified)

    return [
        Part("fusion: combine", combine),
        Part("fusion: update of bank and moments", lambda: fusion.update(batch)),
    ]


def _random_rows(
    first: int, rows: int, width: int, num_classes: int, num_regions: int, known_ratio: float, device: torch.device
) -> Neighbours:
    """Return unit embeddings and regions, labels of which one in ten is positive, and a confidence."""
    generator = torch.Generator().manual_seed(first)
    embeddings = torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1)
    labels = torch.where(torch.rand(rows, num_classes, generator=generator) < 0.1, 1, -1)
    is_known = torch.rand(rows, num_classes, generator=generator) < known_ratio
    confidence = torch.rand(rows, num_classes, generator=generator)
    regions = torch.nn.functional.normalize(torch.randn(rows, num_regions, width, generator=generator), dim=2)
    found = blank(rows, num_classes, width, regions=num_regions)._replace(
        embeddings=embeddings,
        observed=(labels * is_known).to(torch.int8),
        confidence=confidence,
        indices=torch.arange(first, first + rows),
        regions=regions.half(),
    )
    return Neighbours(*(column.to(device) for column in found))


def _encoder_parts(options: Options, network: Network, sizes: Sizes, device: torch.device) -> list[Part]:
    side = options.model.image_size
    generator = torch.Generator().manual_seed(options.seed)
    images = torch.randn(_NUM_VIEWS * sizes.images, 3, side, side, generator=generator).to(device)
    scale = sizes.batch / sizes.images
    teacher = Teacher(network, decay=0.5)
    if uses_bf16(options, device):
        network.to(torch.bfloat16)
    network.train()

    def prompts() -> None:
        _differentiate(network.prompter(network.frozen.text))
        with torch.no_grad():
            teacher.network.prompter(network.frozen.text)

    def extract() -> None:
        network.extract(images)

    def towers() -> None:
        _differentiate(network.embed(images)[0])
        with torch.no_grad():
            teacher.network.embed(images[: sizes.images])

    image = Part(_IMAGE_ENCODER, extract if options.data.cache_features else towers, scale)
    return [image, Part("text encoder", prompts)]


def _differentiate(result: Tensor) -> None:
    if result.requires_grad:  # fixed prompts and a fusion of constants have no gradient
        torch.autograd.backward(result, torch.ones_like(result))


def _times(parts: list[Part], repeats: int, device: torch.device, say: Callable[[str], None]) -> list[float]:
    """Return each part's least seconds over the turns, times how often a step runs it."""
    turns = pairing.take_turns([part.run for part in parts], repeats, lambda: pairing.synchronise(device), say)
    return [min(taken) * part.times_a_step for part, taken in zip(parts, turns, strict=True)]


def _explained(options: Options, sizes: Sizes) -> str:
    lines = [
        f"Image encoder: forward and backward of the student on {_NUM_VIEWS} views, forward of the teacher on one.",
        f"It is timed on {sizes.images} images a view and scaled linearly to {sizes.batch} samples.",
        "Text encoder: all prompts, student and teacher, once a step.",
        "All on one device: ranks would share the image encoder's samples and the rows of `combine`.",
        "Reading data, heads, losses and the optimiser are in no part.",
    ]
    if options.data.cache_features:
        lines[0] = f"Image encoder: forward of the frozen tower on {_NUM_VIEWS} views, which the cached features spare."
    return "\n".join(lines) + "\n\n"


def _table(parts: list[Part], seconds: list[float], *, spares_images: bool) -> str:
    """Return the parts and the fusion's share; also that without the image encoder, where cached features spare it."""
    total = sum(seconds)
    named = dict(zip((part.name for part in parts), seconds, strict=True))
    both = sum(taken for name, taken in named.items() if name.startswith("fusion"))
    rows = [(name, taken, taken / total) for name, taken in named.items()]
    rows.append(("**fusion in all**", both, both / total))
    if spares_images:
        rows.append(("**fusion, features cached**", both, both / (total - named[_IMAGE_ENCODER])))
    lines = [f"| {name} | {taken:.4f} | {share:.1%} |\n" for name, taken, share in rows]
    return "".join(["| part | seconds | share |\n| --- | --- | --- |\n", *lines])
