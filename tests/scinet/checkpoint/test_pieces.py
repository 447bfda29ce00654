"""Pieces written at one number of ranks make the same tensors at any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scinet.checkpoint import files, pieces
from scinet.distributed import Ranks
from scinet.errors import CheckpointError
from scinet.layout import Part, whole

DTYPES = (torch.float32, torch.int8, torch.float64, torch.bool, torch.bfloat16)


def _ranks(rank: int, size: int) -> Ranks:
    return Ranks(rank, size, torch.device("cpu"))


def _stretch(name: str, tensor: Tensor, start: int, numel: int) -> Part:
    held = tensor.view(-1)[start : start + numel]

    def write(values: Tensor) -> None:
        held.copy_(values)

    return Part(name, tuple(tensor.shape), tensor.dtype, start, numel, False, lambda: held, write)


def _partitioned(tensors: dict[str, Tensor], rank: int, size: int) -> list[Part]:
    parts = []
    for name, tensor in tensors.items():
        share = -(-tensor.numel() // size)
        start = min(rank * share, tensor.numel())
        parts.append(_stretch(name, tensor, start, min(share, tensor.numel() - start)))
    return parts


@given(
    st.lists(st.tuples(st.integers(0, 23), st.sampled_from(DTYPES)), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
)
def test_tensors_are_the_same_when_read_at_another_layout(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[tuple[int, torch.dtype]],
    written_by: int,
    read_by: int,
    was_shared: bool,
    is_shared: bool,
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    want = {f"t{n}": (torch.arange(size) % 7).to(dtype) for n, (size, dtype) in enumerate(sizes)}
    paths, num_elements = [], 0
    for rank in range(written_by):
        parts = [whole(n, t) for n, t in want.items()] if was_shared else _partitioned(want, rank, written_by)
        mine = pieces.own(parts, _ranks(rank, written_by))
        num_elements += sum(tensor.numel() for tensor in mine.values())
        paths.append(folder / f"{rank}.safetensors")
        files.write_tensors(paths[-1], mine)
    assert num_elements == sum(size for size, _ in sizes), "each element is written once"
    for rank in range(read_by):
        got = {name: torch.zeros_like(tensor) for name, tensor in want.items()}
        reader = pieces.Reader(paths)
        parts = [whole(n, t) for n, t in got.items()] if is_shared else _partitioned(got, rank, read_by)
        for part in parts:
            if part.numel:
                reader.fill(part)
                assert torch.equal(part.read(), want[part.name].view(-1)[part.start : part.start + part.numel])


def test_a_missing_piece_is_named(tmp_path: Path) -> None:
    tensors = {"weight": torch.arange(10.0), "other": torch.ones(3)}
    parts = [whole(name, tensor) for name, tensor in tensors.items()]
    files.write_tensors(tmp_path / "0.safetensors", pieces.own(parts, _ranks(0, 2)))
    reader = pieces.Reader([tmp_path / "0.safetensors"])
    with pytest.raises(CheckpointError, match=r"'weight' has 7 of 10 elements"):
        reader.fill(parts[0])
    with pytest.raises(CheckpointError, match=r"'other' has 0 of 3 elements"):
        reader.fill(parts[1])


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x04not a checkpoint")
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read"):
        pieces.Reader([tmp_path / "x.safetensors"])
