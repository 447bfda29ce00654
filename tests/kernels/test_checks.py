"""Wrong arguments are refused, and the message says what is required."""

import math

import pytest
import torch

from scinet_kernels import PearsonState, gaussian_propagate, nearest_neighbours, pearson


def test_propagate_refuses_wrong_arguments_in_one_sentence() -> None:
    x, values = torch.zeros(3, 2), torch.zeros(3, 1)
    ids = torch.arange(3)
    cases: list[tuple[type[Exception], str, dict[str, object]]] = [
        (ValueError, "choose one of 'auto', 'triton'", {"backend": "keops"}),
        (ValueError, "must be positive", {"bandwidth": 0.0}),
        (ValueError, "must be positive", {"bandwidth": math.nan}),
        (ValueError, r"bandwidth must have shape \[3\]", {"bandwidth": torch.ones(2)}),
        (TypeError, "floating-point tensor or a float", {"bandwidth": torch.ones(3, dtype=torch.int64)}),
        (TypeError, "keys must be a floating-point", {"keys": torch.zeros(3, 2, dtype=torch.int8)}),
        (ValueError, "keys have 5 columns", {"keys": torch.zeros(3, 5)}),
        (ValueError, "one row for each", {"keys": torch.zeros(4, 2)}),
        (ValueError, "give both or neither", {"keys": x, "query_ids": ids}),
        (ValueError, "without keys", {"key_ids": ids}),
        (TypeError, "query_ids must be int64", {"query_ids": ids.int()}),
        (ValueError, "needs keys=None", {"keys": x, "exclude_self": True}),
        (ValueError, "radius", {"radius": -1.0}),
        (ValueError, "neighbours=0", {"neighbours": 0}),
        (TypeError, "neighbours must be an integer", {"neighbours": 2.5}),
        (ValueError, "key_weights must have shape", {"key_weights": torch.ones(2)}),
        (ValueError, "workspace_bytes", {"workspace_bytes": 0}),
    ]
    for error, message, options in cases:
        with pytest.raises(error, match=message):
            gaussian_propagate(x, values, **{"bandwidth": 1.0, **options})
    with pytest.raises(ValueError, match="2 dimensions"):
        gaussian_propagate(torch.zeros(3), values, bandwidth=1.0)


def test_nearest_neighbours_refuses_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="k=0"):
        nearest_neighbours(torch.zeros(2, 2), 0)
    with pytest.raises(ValueError, match="does not exist"):
        nearest_neighbours(torch.zeros(2, 2), 1, backend="faiss")
    with pytest.raises(ValueError, match="columns"):
        nearest_neighbours(torch.zeros(2, 2), 1, keys=torch.zeros(2, 3))


def test_pearson_refuses_wrong_arguments() -> None:
    values = torch.zeros(3, 2)
    with pytest.raises(TypeError, match="known must be bool"):
        pearson(values, torch.ones(3, 2))
    with pytest.raises(TypeError, match="values must be a floating-point"):
        pearson(values.long())
    with pytest.raises(ValueError, match="weights has shape"):
        pearson(values, weights=torch.ones(3))
    with pytest.raises(ValueError, match="does not exist"):
        pearson(values, backend="keops")
    with pytest.raises(ValueError, match="needs a GPU tensor"):
        pearson(values, backend="triton")
    with pytest.raises(ValueError, match="columns"):
        PearsonState(3).update(values)
    with pytest.raises(ValueError, match="cannot merge"):
        PearsonState(3).merge(PearsonState(2))
