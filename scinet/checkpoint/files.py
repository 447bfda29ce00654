"""Files of a checkpoint: tensors as safetensors with a checksum, and the manifest that says they are all there.

Written under a temporary name, flushed to the disk and renamed; any changed byte is found. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scinet.errors import CheckpointError

MANIFEST = "manifest.json"
_CHUNK = 2**24
_NO_CHECKSUM = "0" * 64
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Written(NamedTuple):
    """Name, size in bytes and SHA-256 of a file."""

    name: str
    num_bytes: int
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Write contiguous CPU tensors in the format of safetensors, flushed to the disk.

    The library's own writer copies all tensors first, and holds the interpreter's lock until the disk has them, during
    which training would stand still.

    Raises:
        OSError: if the disk is full, for instance.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("wb") as file:
        contents: Iterator[bytes | memoryview] = map(_bytes, tensors.values())
        for content in chain((len(text).to_bytes(8, "little"), text), contents):
            for begin in range(0, len(content), _CHUNK):
                piece = content[begin : begin + _CHUNK]
                file.write(piece)
                digest.update(piece)
            num_bytes += len(content)
        file.flush()
        os.fsync(file.fileno())
    return Written(path.name, num_bytes, digest.hexdigest())


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def check(folder: Path, written: Written) -> str | None:
    """Return what is wrong with a file, or None if it is as it was written."""
    path = folder / written.name
    try:
        size = path.stat().st_size
        if size != written.num_bytes:
            return f"{written.name} has {size} bytes instead of {written.num_bytes}"
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{written.name} cannot be read: {error.strerror}"
    return None if found == written.sha256 else f"the checksum of {written.name} is wrong"


def write_manifest(folder: Path, content: dict[str, Any], parts: Iterable[Written]) -> None:
    """Write what a checkpoint holds; its last line is the SHA-256 of itself with zeros in that place."""
    whole = {**content, "parts": [list(part) for part in parts], "sha256": _NO_CHECKSUM}
    text = json.dumps(whole, indent=1) + "\n"
    checksum = hashlib.sha256(text.encode()).hexdigest()
    path = folder / MANIFEST
    with path.open("w", encoding="utf-8") as file:
        file.write(text.replace(_NO_CHECKSUM, checksum))
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> tuple[dict[str, Any], list[Written]]:
    """Return what :func:`write_manifest` wrote.

    Raises:
        CheckpointError: saying in a few words what is wrong with it.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"it has no {MANIFEST}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"its {MANIFEST} cannot be read") from error
    _, _, last = text.rpartition('"sha256": "')
    checksum = last[: len(_NO_CHECKSUM)]
    if hashlib.sha256(text.replace(checksum, _NO_CHECKSUM).encode()).hexdigest() != checksum:
        raise CheckpointError(f"the checksum of its {MANIFEST} is wrong")
    try:
        content: dict[str, Any] = json.loads(text)
        parts = [Written(*part) for part in content["parts"]]
        if any(Path(part.name).name != part.name for part in parts):
            raise ValueError("a part's name leads elsewhere")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"its {MANIFEST} is not one of scinet's ({error})") from error
    return content, parts


def flush_folder(folder: Path) -> None:
    """Make sure that names in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
