"""Towers through open_clip: any name and tag it knows, a weights file, or the embedded default.

Shapes: B images, C classes, T tokens, W token width, F image features, R regions, D embedding.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from scinet.data.views import Normalisation
from scinet.errors import ConfigError, nearest
from scinet.model import embedded, embedded_towers, regions
from scinet.options import DEBUG, EMBEDDED, OWN_BACKBONES, ModelOptions
from scinet.preflight import check_backbone

_log = logging.getLogger(__name__)
_Dense = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]


class ImageTower(nn.Module):
    """Images to features, and features to embeddings.

    ``trunk`` is what ``model.freeze_image`` freezes; ``projection`` trains in any case.
    """

    def __init__(
        self, trunk: nn.Module, projection: nn.Module, *, has_regions: bool, dense: _Dense | None = None
    ) -> None:
        """Take the parts of an open_clip image tower.

        Args:
            trunk: images to features.
            projection: features to embeddings.
            has_regions: the trunk ends in a feature map that it pools.
            dense: where it does not: from trunk and images to pooled features [B, F] and those of regions [B, R, F].
        """
        super().__init__()
        self.trunk, self.projection, self._has_regions, self._dense = trunk, projection, has_regions, dense

    @property
    def shows_regions(self) -> bool:
        """Whether :meth:`regions` has an answer."""
        return self._has_regions or self._dense is not None

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return pooled features [B, F] and, where the tower has a feature map, those of its regions [B, R, F].

        Args:
            images: [B, 3, H, W], normalised.
        """
        if not self._has_regions:
            return self.trunk(images), None
        trunk = cast(Any, self.trunk)
        grid = trunk.forward_features(images)
        return trunk.forward_head(grid), regions.of_map(trunk, grid)

    def regions(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled features [B, F] and those of the regions [B, R, F], row by row of a square; for heads.

        CLIP's own towers show them here only: the prompt head's attention has never looked at them.

        Args:
            images: [B, 3, H, W], normalised.
        """
        if self._dense is not None:
            return self._dense(self.trunk, images)
        pooled, shown = self.features(images)
        assert shown is not None, "the network refuses such a tower"
        return pooled, shown


class TextTower(nn.Module):
    """The frozen text tower; context vectors may stand in for the first words of a prompt."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        """Take an open_clip model, whose image tower is dropped, and its tokenizer."""
        super().__init__()
        self._model, self._tokenizer = model, tokenizer
        self._embedding = _token_embedding(model)
        self._embedded: tuple[Tensor, Tensor] | None = None
        text = getattr(model, "text", None)
        # open_clip's own transformers need the full context length, those of transformers mask their padding
        self._is_trimmable = hasattr(text, "config") or getattr(text, "is_trimmable", False)
        self.requires_grad_(False)
        self.eval()

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return token ids [C, T] int64."""
        tokens = cast(Tensor, self._tokenizer(list(texts))).to(next(self.parameters()).device)
        if not self._is_trimmable:
            return tokens
        return tokens[:, : int((tokens != tokens[:, -1:]).sum(1).max()) + 1]

    def count_words(self, context: str) -> int:
        """Return how many tokens the context takes, between the start and the end mark."""
        tokens = cast(Tensor, self._tokenizer([context, ""]))
        padding = tokens[1, -1]
        return int((tokens[0] != padding).sum() - (tokens[1] != padding).sum())

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Return the token embeddings [..., W]."""
        return cast(Tensor, self._embedding(tokens))

    def embed(self, tokens: Tensor) -> Tensor:
        """Return text embeddings [C, D] fp32 of prompts as they are; a run's networks ask for the same ones."""
        if self._embedded is None or not torch.equal(self._embedded[0], tokens):
            with torch.no_grad():
                self._embedded = tokens, self(tokens).float()
        return self._embedded[1].clone()

    def forward(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        """Return text embeddings [C, D].

        Args:
            tokens: [C, T].
            context: [m, W], used instead of the embeddings of tokens 1 to m; differentiable.
        """
        encode = cast(Any, self._model).encode_text
        if context is None:
            return cast(Tensor, encode(tokens))
        with _replaced(self._embedding, context):
            return cast(Tensor, encode(tokens))


@dataclass(frozen=True)
class Backbone:
    """Both towers, and what has to be known about them."""

    image: ImageTower
    text: TextTower
    feature_width: int
    width: int
    logit_scale: float
    normalisation: Normalisation
    name: str
    weights_sha256: str


@contextlib.contextmanager
def _replaced(embedding: nn.Module, context: Tensor) -> Iterator[None]:
    """Overwrite tokens 1 to m of whatever ``embedding`` returns: works for every text tower open_clip has."""

    def put(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        words = context.to(output.dtype).expand(output.shape[0], -1, -1)
        return torch.cat([output[:, :1], words, output[:, 1 + len(context) :]], dim=1)

    handle = embedding.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def _token_embedding(model: nn.Module) -> nn.Module:
    text: Any = getattr(model, "text", model)
    found = text.token_embedding if hasattr(text, "token_embedding") else text.transformer.get_input_embeddings()
    return cast(nn.Module, found)


def load(options: ModelOptions, cache: Path) -> Backbone:
    """Return the pretrained towers.

    Args:
        options: ``backbone`` and ``pretrained`` as open_clip's model name and tag, a weights file, or ``embedded``.
        cache: folder of derived files.

    Raises:
        ConfigError: for an unknown name or tag, or weights that cannot be had; never returns untrained towers.
    """
    name, tag, weights = _find(options, cache)
    model: nn.Module
    if options.backbone == DEBUG:
        model, tokenizer = embedded_towers.debug()
    elif options.backbone == EMBEDDED:
        assert weights is not None
        model, tokenizer = embedded.load(weights.parent)
    else:
        model, tokenizer = _create(name, tag, options)
    return _split(model, tokenizer, options, _identity(name, tag, weights))


def open_clip_model(options: ModelOptions, cache: Path) -> tuple[nn.Module, Any]:
    """Return open_clip's own pretrained model and its tokenizer, of the embedded towers as well.

    Raises:
        ConfigError: as :func:`load`.
    """
    name, tag, weights = _find(options, cache)
    if options.backbone == EMBEDDED:
        assert weights is not None
        os.environ["HF_HUB_OFFLINE"] = "1"  # all of it is in the folder
        name = f"local-dir:{weights.parent}"
    return _create(name, tag, options)


def identify(options: ModelOptions, cache: Path) -> str:
    """Return what :func:`load` gives as the hash of the weights, without loading them.

    Raises:
        ConfigError: as :func:`load`, for an unknown name or tag, or a file that does not exist.
    """
    return _identity(*_find(options, cache))


def _identity(name: str, tag: str, weights: Path | None) -> str:
    return _hash(weights) if weights else f"{name}:{tag}"


def _find(options: ModelOptions, cache: Path) -> tuple[str, str, Path | None]:
    """Return open_clip's name and tag, and the weights where they are a file."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.backbone in OWN_BACKBONES:
        if options.pretrained != EMBEDDED:
            raise ConfigError(
                f"model.pretrained is '{options.pretrained}', but model.backbone={options.backbone} has its own weights"
            )
        if options.backbone == DEBUG:
            return DEBUG, "random", None
        return EMBEDDED, "", embedded.ensure(cache) / embedded.WEIGHTS
    if not _reaches_hub():
        # read when huggingface_hub is imported: without it each missing file costs five silent retries
        os.environ["HF_HUB_OFFLINE"] = "1"
    return options.backbone, options.pretrained, _check_name(options.backbone, options.pretrained)


def skeleton(options: ModelOptions, cache: Path) -> Backbone:
    """Return towers of the right shapes; those that open_clip knows by name are on `meta` and need no weights.

    Raises:
        ConfigError: as :func:`load`, for an unknown name, or weights in a folder or a hub that cannot be had.
    """
    name = options.backbone
    if name in OWN_BACKBONES or name.startswith(("local-dir:", "hf-hub:")):
        return load(options, cache)
    import open_clip

    check_backbone(name)
    logging.disable(logging.ERROR)  # open_clip warns that there are no weights
    try:
        with torch.device("meta"):
            model = open_clip.create_model(name, device="meta", force_image_size=options.image_size)
    finally:
        logging.disable(logging.NOTSET)
    cast(Any, model).logit_scale = nn.Parameter(torch.zeros(()))  # is read, and has no value on `meta`
    return _split(model, open_clip.get_tokenizer(name), options, "")


def _reaches_hub() -> bool:
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or ""
    try:
        with socket.create_connection((host, 443), timeout=5):
            return True
    except OSError:
        return False


def _check_name(name: str, tag: str) -> Path | None:
    import open_clip

    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
        if not files:
            raise ConfigError(f"model.backbone={name}: the folder holds no weights (*.safetensors)")
        return files[0]
    if name.startswith("hf-hub:"):
        return None
    check_backbone(name)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag in tags:
        return None
    path = Path(tag)
    if not tag or tag == EMBEDDED or not path.is_file():
        raise ConfigError(
            f"model.pretrained='{tag}' is neither a file nor a tag of {name}{nearest(tag, tags)} "
            f"(tags: {', '.join(tags) or 'none'}; or pass a weights file, or model.backbone=embedded)"
        )
    return path


def _create(name: str, tag: str, options: ModelOptions) -> tuple[nn.Module, Any]:
    import open_clip

    # open_clip reports each of its choices on the root logger, and its errors there again before it raises them
    logging.disable(logging.ERROR)
    size = options.image_size if not name.startswith("local-dir:") else None
    try:
        model = open_clip.create_model(name, pretrained=tag or None, require_pretrained=True, force_image_size=size)
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, OSError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        wanted = f"the weights of model.backbone={options.backbone}, model.pretrained={options.pretrained}"
        raise ConfigError(
            f"{wanted} cannot be had: {reason}; pass a weights file as model.pretrained, or set "
            "model.backbone=embedded model.pretrained=embedded, which needs no network"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    return model, tokenizer


def _split(model: nn.Module, tokenizer: Any, options: ModelOptions, weights_sha256: str) -> Backbone:
    visual = cast(Any, model).visual
    preprocess = visual.preprocess_cfg
    projection = getattr(getattr(visual, "head", None), "proj", None)
    if isinstance(projection, nn.Linear) and hasattr(visual, "trunk"):
        tower = ImageTower(visual.trunk, projection, has_regions=visual.trunk.feature_info is not None)
        feature_width, width = projection.in_features, projection.out_features
    else:
        width = feature_width = int(visual.output_dim)
        tail: nn.Module = nn.Identity()
        if options.freeze_image:
            tail = nn.Linear(width, width, bias=False)
            nn.init.eye_(tail.weight)
        tower = ImageTower(visual, tail, has_regions=False, dense=regions.reader(visual))
    tower.eval()
    scale = float(cast(Any, model).logit_scale.detach().exp())
    del cast(Any, model).visual
    return Backbone(
        image=tower,
        text=TextTower(model, tokenizer),
        feature_width=feature_width,
        width=width,
        logit_scale=scale,
        normalisation=Normalisation(tuple(preprocess["mean"]), tuple(preprocess["std"])),
        name=options.backbone,
        weights_sha256=weights_sha256,
    )


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
