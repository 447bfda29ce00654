"""Shape, dtype and device checks; every failure is one sentence: what was given, what is required.

Values are never looked at: that would make the host wait for the device. NaN and Inf in queries, keys or values
therefore propagate into the results.
"""

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "cpu", "reference")
PRECISIONS = ("auto", "ieee")


def check_backend(backend: str) -> None:
    """Refuse a backend that does not exist.

    Args:
        backend: name as the caller typed it.

    Raises:
        ValueError: the name is not one of `BACKENDS`.

    """
    if backend not in BACKENDS:
        names = ", ".join(repr(name) for name in BACKENDS)
        raise ValueError(f"backend={backend!r} does not exist: choose one of {names}.")


def check_precision(precision: str) -> None:
    """Refuse a precision that does not exist.

    Args:
        precision: name as the caller typed it.

    Raises:
        ValueError: the name is not one of `PRECISIONS`.

    """
    if precision not in PRECISIONS:
        names = ", ".join(repr(name) for name in PRECISIONS)
        raise ValueError(f"precision={precision!r} does not exist: choose one of {names}.")


def check_matrix(name: str, tensor: Tensor) -> None:
    """Require a floating-point matrix.

    Args:
        name: argument name for the message.
        tensor: candidate, to be [rows, columns].

    Raises:
        TypeError: not a real floating-point tensor.
        ValueError: not two-dimensional.

    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        given = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {given}.")
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions [rows, columns], got shape {list(tensor.shape)}.")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Require two tensors to live on one device.

    Args:
        name: argument name of `tensor`.
        tensor: any tensor.
        other_name: argument name of `other`.
        other: any tensor.

    Raises:
        ValueError: the devices differ.

    """
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} but {other_name} is on {other.device}: move one of them.")


def check_keys(queries: Tensor, keys: Tensor | None) -> int:
    """Check queries against keys and count the keys.

    Args:
        queries: [B, D] floating point.
        keys: [M, D] floating point, or None: the queries themselves.

    Returns:
        M, the number of (local) keys.

    Raises:
        TypeError: a dtype is not floating point.
        ValueError: shapes or devices do not fit.

    """
    check_matrix("queries", queries)
    if keys is None:
        return queries.shape[0]
    check_matrix("keys", keys)
    check_same_device("keys", keys, "queries", queries)
    if keys.shape[1] != queries.shape[1]:
        raise ValueError(f"keys have {keys.shape[1]} columns but queries have {queries.shape[1]}: they must agree.")
    return keys.shape[0]


def check_bandwidth(bandwidth: float | Tensor, queries: Tensor) -> None:
    """Require a positive number, a scalar tensor or one bandwidth per query; tensor values are not looked at.

    Args:
        bandwidth: float > 0 (infinity allowed), or floating-point tensor [] or [B].
        queries: [B, D].

    Raises:
        TypeError: an integer tensor.
        ValueError: a number that is not positive, or a tensor of another shape or device.

    """
    if not isinstance(bandwidth, Tensor):
        if not bandwidth > 0:
            raise ValueError(f"bandwidth={bandwidth} must be positive.")
        return
    if not bandwidth.is_floating_point():
        raise TypeError(f"bandwidth must be a floating-point tensor or a float, got {bandwidth.dtype}.")
    if bandwidth.dim() > 0:
        check_vector("bandwidth", bandwidth, queries, queries.shape[0], "queries")


def check_vector(name: str, tensor: Tensor, like: Tensor, rows: int, rows_name: str) -> None:
    """Require one entry per row.

    Args:
        name: argument name for the message.
        tensor: candidate, to be [rows].
        like: a tensor on the required device.
        rows: required length.
        rows_name: what the rows are, for the message.

    Raises:
        ValueError: shape or device do not fit.

    """
    if tensor.shape != (rows,):
        raise ValueError(
            f"{name} must have shape [{rows}], one entry for each of the {rows_name}, got {list(tensor.shape)}."
        )
    check_same_device(name, tensor, rows_name, like)


def check_pairs(
    queries: Tensor,
    keys: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    key_weights: Tensor | None,
    radius: float | None,
    neighbours: int | None,
) -> None:
    """Check everything that decides which pairs count.

    Args:
        queries: [B, D], already checked.
        keys: [M, D], already checked, or None: the queries themselves.
        query_ids: [B] int64 or None.
        key_ids: [M] int64 or None.
        key_weights: [M] floating point or None.
        radius: largest distance, > 0, or None.
        neighbours: number of nearest keys, >= 1, or None.

    Raises:
        TypeError: ids are not int64, or weights not floating point.
        ValueError: shapes, devices or ranges do not fit, or one kind of id comes without the other.

    """
    rows = (queries if keys is None else keys).shape[0]
    if keys is None and key_ids is not None:
        raise ValueError("key_ids are given without keys: pass query_ids alone, they name the keys too.")
    if keys is not None and (query_ids is None) != (key_ids is None):
        raise ValueError("query_ids and key_ids exclude pairs of equal id: with keys, give both or neither.")
    for name, ids, count, of in (("query_ids", query_ids, len(queries), "queries"), ("key_ids", key_ids, rows, "keys")):
        if ids is None:
            continue
        if ids.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {ids.dtype}.")
        check_vector(name, ids, queries, count, of)
    if key_weights is not None:
        if not key_weights.is_floating_point():
            raise TypeError(f"key_weights must be floating point, got {key_weights.dtype}.")
        check_vector("key_weights", key_weights, queries, rows, "keys")
    if radius is not None and not radius > 0:
        raise ValueError(f"radius={radius} must be positive, or None for no limit.")
    if neighbours is not None:
        check_at_least_one("neighbours", neighbours)


def check_at_least_one(name: str, number: int) -> None:
    """Require a whole number >= 1.

    Args:
        name: argument name for the message.
        number: candidate.

    Raises:
        TypeError: not an integer.
        ValueError: smaller than 1.

    """
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"{name} must be an integer, got {type(number).__name__}.")
    if number < 1:
        raise ValueError(f"{name}={number} must be at least 1.")


def check_cells(values: Tensor, known: Tensor | None, weights: Tensor | None) -> None:
    """Check a matrix of observations with its mask and cell weights.

    Args:
        values: [N, C] floating point.
        known: [N, C] bool or None.
        weights: [N, C] floating point or None.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape or device does not fit.

    """
    check_matrix("values", values)
    if known is not None and known.dtype != torch.bool:
        raise TypeError(f"known must be bool (True where the cell is observed), got {known.dtype}.")
    if weights is not None and not weights.is_floating_point():
        raise TypeError(f"weights must be floating point, got {weights.dtype}.")
    for name, tensor in (("known", known), ("weights", weights)):
        if tensor is None:
            continue
        if tensor.shape != values.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)} but values have {list(values.shape)}.")
        check_same_device(name, tensor, "values", values)
