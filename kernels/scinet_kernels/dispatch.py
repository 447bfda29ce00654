"""Which implementation runs: by name, or by dtype, device and size (kernels.md section 5.2)."""

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

# Below this many query rows a launch does not fill a GPU, and library products on a stored panel are as fast.
SMALLEST_TRITON_ROWS = 2048
# The oldest NVIDIA GPU whose shared memory and tensor cores fit the table of tiles.
_OLDEST_CAPABILITY = (8, 0)

# Up to these bytes of keys, values, ids and weights on all ranks together every rank gathers them all: one collective,
# large tiles, and at the size of a batch little memory (kernels.md section 4). Beyond, they go round (`ring.py`).
LARGEST_GATHER_BYTES = 1 << 30


def choose(operator: str, backend: str, tensor: Tensor, *, rows: int, fits_triton: bool = True) -> str:
    """Name the implementation to run; an automatic choice is said once at debug level.

    Args:
        operator: name of the public function, for the message.
        backend: "auto", "triton", "cpu" or "reference", already checked.
        tensor: operand whose dtype and device decide; already promoted to the dtype of the computation's result.
        rows: number of query rows (Gaussian) or observations (Pearson).
        fits_triton: whether the Triton kernels know every option of this call.

    Returns:
        "triton", "cpu" (blocked PyTorch, which runs on every device) or "reference".

    Raises:
        ValueError: Triton was asked for by name and cannot run this call.

    Source: kernels.md section 5.2.

    """
    if backend == "triton":
        _require_triton(operator, tensor, fits_triton)
        return backend
    if backend != "auto":
        return backend
    fits_triton = fits_triton and has_triton() and not is_interpreting()
    chosen = automatic(tensor.dtype, tensor.device, rows=rows, fits_triton=fits_triton)
    if chosen == "triton" and _is_too_old(tensor.device):
        chosen = "cpu"
        _warn_once(torch.cuda.get_device_name(tensor.device))
    _say_once(operator, chosen, str(tensor.dtype), tensor.device.type)
    return chosen


def automatic(dtype: torch.dtype, device: torch.device, *, rows: int, fits_triton: bool) -> str:
    """Name what "auto" takes, from the shape alone; the device need not be there.

    Args:
        dtype: of the computation's result.
        device: where the operands are.
        rows: number of query rows (Gaussian) or observations (Pearson).
        fits_triton: whether the Triton kernels can run and know every option of the call.

    """
    if dtype == torch.float64:
        return "reference"
    return "triton" if device.type == "cuda" and fits_triton and rows >= SMALLEST_TRITON_ROWS else "cpu"


def goes_round(operator: str, chosen: str, num_bytes: int, *, has_neighbours: bool) -> bool:
    """Return whether the ranks' keys go round instead of being gathered; said once at debug level.

    Args:
        operator: name of the public function, for the message.
        chosen: the implementation.
        num_bytes: of keys, values, ids and weights of all ranks, so that all ranks decide alike.
        has_neighbours: whether the nearest keys of all ranks are to be chosen.

    Source: ours.

    """
    if num_bytes <= LARGEST_GATHER_BYTES or has_neighbours or chosen == "reference":
        return False
    _say_ring_once(operator)
    return True


def has_triton() -> bool:
    """Return whether Triton is installed; it is imported only where a kernel is launched or compiled."""
    return importlib.util.find_spec("triton") is not None


def is_interpreting() -> bool:
    """Return whether Triton kernels would run in its interpreter, on tensors of any device and very slowly."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _require_triton(operator: str, tensor: Tensor, fits_triton: bool) -> None:
    if not has_triton():
        raise ValueError(f"backend='triton' for {operator}: Triton is not installed, use backend='auto'.")
    if not fits_triton:
        raise ValueError(f"backend='triton' for {operator}: the kernels have no `neighbours`, use backend='auto'.")
    if tensor.dtype == torch.float64:
        raise ValueError(f"backend='triton' for {operator}: the kernels have no float64, use backend='reference'.")
    if _is_too_old(tensor.device):
        raise ValueError(
            f"backend='triton' for {operator}: {torch.cuda.get_device_name(tensor.device)} is older than the kernels' "
            "tiles (compute capability 8.0), use backend='auto'."
        )
    if not tensor.is_cuda and not is_interpreting():
        raise ValueError(
            f"backend='triton' for {operator} needs a GPU tensor, got {tensor.device} "
            "(or TRITON_INTERPRET=1 in the environment, for tests)."
        )


@functools.lru_cache
def _say_once(operator: str, chosen: str, dtype: str, device: str) -> None:
    _log.debug("%s on %s, %s: backend '%s'", operator, device, dtype, chosen)


def _is_too_old(device: torch.device) -> bool:
    is_nvidia = device.type == "cuda" and not torch.version.hip
    return is_nvidia and torch.cuda.get_device_capability(device) < _OLDEST_CAPABILITY


@functools.lru_cache
def _warn_once(gpu: str) -> None:
    _log.warning("%s is older than the Triton kernels' tiles (compute capability 8.0): PyTorch does the work", gpu)


@functools.lru_cache
def _say_ring_once(operator: str) -> None:
    _log.debug("%s: over %d bytes of rows on all ranks, which go round", operator, LARGEST_GATHER_BYTES)
