"""The operators' inner loops in C: built with this machine's compiler at first use, and kept for later processes.

Matrix products stay with the library that torch multiplies with; its `gemm` is handed to the C code, which runs one
tile on each thread of torch's own pool. Where there is no compiler, or no such library, PyTorch does the work.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent / "native"
_FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"),
    # what a compiler may assume here, so that it turns loops into vector code: nobody reads errno or traps
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
_GEMM = {torch.float32: "sgemm_", torch.float64: "dgemm_"}
_TIMEOUT_S = 120


def pointer(tensor: Tensor | None) -> int | None:
    """Return a tensor's address for C, or None, which C sees as NULL."""
    return None if tensor is None else tensor.data_ptr()


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return the compiled routines for fp32 or float64, or None where they cannot be had, which is said once.

    Args:
        dtype: of all floating-point operands.

    """
    if dtype not in _GEMM or gemm(dtype) is None:
        return None
    return _built(dtype)


@functools.lru_cache
def gemm(dtype: torch.dtype) -> int | None:
    """Return the address of the matrix product in torch's own library, or None where it has no such function.

    Args:
        dtype: fp32 or float64.

    """
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        function = getattr(ctypes.CDLL(str(path)), _GEMM[dtype], None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p).value
    _log.warning("torch's library offers no %s: the CPU path runs in PyTorch, which is slower", _GEMM[dtype])
    return None


@functools.lru_cache
def _built(dtype: torch.dtype) -> ctypes.CDLL | None:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)
    if compiler is None:
        _log.warning("no C compiler (cc, gcc, clang or $CC): the CPU path runs in PyTorch, which is slower")
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler, dtype)))
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else str(error)
        _log.warning("%s cannot build the CPU routines, which run in PyTorch instead, slower: %s", compiler, said)
        return None


def _compiled(compiler: str, dtype: torch.dtype) -> Path:
    """Return the shared object, from the cache if this processor, compiler and source made it before."""
    sources = sorted(_SOURCES.glob("*.[ch]"))
    command = [compiler, *_FLAGS, *(["-DSCINET_DOUBLE"] if dtype == torch.float64 else [])]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=_TIMEOUT_S).stdout
    parts = [*(path.read_bytes() for path in sources), repr(command).encode(), version, _processor()]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scinet" / "native"
    target = root / f"{hashlib.sha256(b'|'.join(parts)).hexdigest()[:20]}.so"
    if not target.exists():
        # what is loaded from here runs as this user: nobody else may write it
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as folder:
            made = Path(folder) / target.name
            code = [str(path) for path in sources if path.suffix == ".c"]
            subprocess.run([*command, *code, "-o", str(made)], capture_output=True, check=True, timeout=_TIMEOUT_S)
            made.rename(target)
    return target


def _processor() -> bytes:
    """What the code is made for: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"|".join(sorted({line for line in lines if line.startswith((b"model name", b"flags", b"Features"))}))
