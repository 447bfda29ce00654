"""Any changed byte of a checkpoint is found, and nothing in one is trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from scinet.checkpoint import files
from scinet.errors import CheckpointError


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {
        "a@0": torch.randn(5),
        "b": torch.randn(3, 4).to(torch.bfloat16),
        "c": torch.tensor([True, False]),
        "empty": torch.empty(0, dtype=torch.int64),
        "scalar": torch.tensor(7),
        "d": torch.randn(2, 3, dtype=torch.float64).T.contiguous(),
        "e": torch.arange(3, dtype=torch.int8),
    }


def test_safetensors_reads_what_was_written(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    written = files.write_tensors(tmp_path / "x.safetensors", tensors)
    read = load_file(str(tmp_path / "x.safetensors"))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items())
    assert written.num_bytes == (tmp_path / "x.safetensors").stat().st_size
    assert files.check(tmp_path, written) is None


def test_every_changed_byte_is_found(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    written = files.write_tensors(tmp_path / "x.safetensors", tensors)
    files.write_manifest(tmp_path, {"state": {"step": 3}}, [written])
    for path, is_found in (
        (tmp_path / "x.safetensors", lambda: files.check(tmp_path, written) is not None),
        (tmp_path / files.MANIFEST, lambda: _is_refused(tmp_path)),
    ):
        whole = path.read_bytes()
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert is_found(), f"byte {place} of {path.name}"
        for length in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            assert is_found(), f"{path.name} cut to {length}"
        path.write_bytes(whole + b"x")
        assert is_found()
        path.unlink()
        assert is_found()
        path.write_bytes(whole)
    assert files.read_manifest(tmp_path) == ({"state": {"step": 3}, **_rest(tmp_path)}, [written])


def _is_refused(folder: Path) -> bool:
    try:
        files.read_manifest(folder)
    except CheckpointError:
        return True
    return False


def _rest(folder: Path) -> dict[str, object]:
    content = json.loads((folder / files.MANIFEST).read_text())
    return {name: content[name] for name in ("parts", "sha256")}


@given(st.binary(max_size=300))
def test_a_manifest_of_any_bytes_is_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    (folder / files.MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError):
        files.read_manifest(folder)


@pytest.mark.parametrize("parts", [[["../../etc/passwd", 1, "0"]], [["a"]], 3, [[1, 2, 3]], None])
def test_a_manifest_with_a_right_checksum_and_strange_parts_is_refused(tmp_path: Path, parts: object) -> None:
    files.write_manifest(tmp_path, {"x": 1}, [])
    path = tmp_path / files.MANIFEST
    content = json.loads(path.read_text()) | {"parts": parts, "sha256": "0" * 64}
    text = json.dumps(content, indent=1) + "\n"
    import hashlib

    path.write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest()))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        files.read_manifest(tmp_path)
