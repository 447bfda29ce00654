"""Compile every kernel at every shipped tile without a GPU, and read what the compiler made of it.

`python -m scinet_kernels.compiling --write` makes `kernels/compiled.json` anew, without the flag it prints the table.
Registers, spills, shared memory and matrix instructions are facts about the binary; speed is not among them.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from scinet_kernels import gaussian_triton, pearson_triton, tiles
from scinet_kernels.tiles import Compilation, Tile

TABLE_PATH = Path(__file__).parents[1] / "compiled.json"

_TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory (LDS) that one program may have.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
_MATRIX = {"sm_80": r"\bHMMA", "sm_90": r"\bHGMMA", "sm_100": r"\bUTC\w*MMA", "gfx942": r"v_mfma"}
_DTYPES = {16: torch.bfloat16, 32: torch.float32}
_VARIANTS = {
    "gaussian_forward": ("forward", "forward_bounded"),
    "gaussian_forward_held": ("held_forward", "held_forward_bounded"),
    "gaussian_panel": ("panel", "panel_with_weights"),
    "pearson": ("moments",),
}


@dataclass(frozen=True)
class Compiled:
    """What came out of one compilation.

    Attributes:
        kernel: name in `tiles.TABLE`, with its variant.
        architecture: target.
        bits: width of the inputs.
        tile: sizes, warps, stages, in the order of :class:`Tile`.
        registers: vector registers a thread.
        spills: spill instructions (NVIDIA: STL and LDL; AMD: spilled vector registers).
        shared_bytes: shared memory of a program.
        matrix_instructions: tensor-core (matrix-core) instructions in the code.

    """

    kernel: str
    architecture: str
    bits: int
    tile: list[int]
    registers: int
    spills: int
    shared_bytes: int
    matrix_instructions: int


def compile_all() -> Iterator[Compiled]:
    """Compile every row of `tiles.TABLE`; about a second each.

    Yields:
        One result for each variant of each row, in the order of the table.

    """
    for (kernel, architecture, bits), tile in tiles.TABLE.items():
        for variant in _VARIANTS[kernel]:
            described = _describe(variant, tile, _DTYPES[bits], is_amd=architecture.startswith("gfx"))
            yield _compile(f"{kernel}/{variant}", architecture, bits, described)


def read_table() -> list[Compiled]:
    """Return the committed results."""
    return [Compiled(**row) for row in json.loads(TABLE_PATH.read_text(encoding="utf-8"))]


def _describe(variant: str, tile: Tile, dtype: torch.dtype, *, is_amd: bool) -> Compilation:
    module: Any = pearson_triton if variant == "moments" else gaussian_triton
    described: Compilation = module.ahead_of_time(variant, tile, dtype, is_amd=is_amd)
    return described


def _compile(kernel: str, architecture: str, bits: int, described: Compilation) -> Compiled:
    names = list(described.kernel.arg_names)
    source = ASTSource(
        fn=described.kernel,
        signature=described.signature,
        constexprs={(names.index(name),): value for name, value in described.constants.items()},
        # without it no wide loads, and every figure misleads
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in described.aligned},
    )
    tile = described.tile
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    binary: Any = triton.compile(source, target=_TARGETS[architecture], options=options)
    read = _read_amd if architecture.startswith("gfx") else _read_nvidia
    registers, spills, matrix = read(binary, _MATRIX[architecture])
    return Compiled(kernel, architecture, bits, list(astuple(tile)), registers, spills, binary.metadata.shared, matrix)


def _read_nvidia(binary: Any, matrix: str) -> tuple[int, int, int]:
    tools = Path(nvidia.__path__[0]) / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _output([str(tools / "cuobjdump"), "-res-usage", file.name])
        code = _output([str(tools / "nvdisasm"), "-c", file.name])
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None, usage
    return int(found.group(1)), len(re.findall(r"\b(?:STL|LDL)\b", code)), len(re.findall(matrix, code))


def _read_amd(binary: Any, matrix: str) -> tuple[int, int, int]:
    code = binary.asm["amdgcn"]
    registers, spills = (re.search(rf"\.{key}:\s*(\d+)", code) for key in ("vgpr_count", "vgpr_spill_count"))
    assert registers is not None
    assert spills is not None
    return int(registers.group(1)), int(spills.group(1)), len(re.findall(matrix, code))


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(prog="python -m scinet_kernels.compiling", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE_PATH.name} instead of only printing")
    arguments = parser.parse_args()
    names = [field.name for field in fields(Compiled)]
    print(" | ".join(names))
    rows = []
    for compiled in compile_all():
        rows.append(dict(zip(names, astuple(compiled), strict=True)))
        print(" | ".join(str(value) for value in rows[-1].values()), flush=True)
    if arguments.write:
        TABLE_PATH.write_text("[\n" + ",\n".join(" " + json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
