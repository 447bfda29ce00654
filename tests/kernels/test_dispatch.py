"""Which implementation "auto" takes on which GPU, and what it says."""

import logging
from types import SimpleNamespace

import pytest
import torch

from scinet_kernels import dispatch, gaussian_propagate

ON_GPU = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"), is_cuda=True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    dispatch._warn_once.cache_clear()
    dispatch._say_once.cache_clear()


@pytest.mark.parametrize("gpu", [(8, 0), (9, 0)], indirect=True)
@pytest.mark.usefixtures("gpu")
def test_auto_takes_triton_when_the_gpu_has_tiles_and_enough_rows(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for _ in range(2):
        assert dispatch.choose("gaussian_propagate", "auto", ON_GPU, rows=4096) == "triton"
    assert dispatch.choose("gaussian_propagate", "auto", ON_GPU, rows=100) == "cpu"
    assert dispatch.choose("gaussian_propagate", "auto", ON_GPU, rows=4096, fits_triton=False) == "cpu"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2  # one for each choice, however often it is made
    assert all(record.levelno == logging.DEBUG for record in caplog.records)


@pytest.mark.parametrize(
    ("dtype", "device", "rows", "fits", "taken"),
    [
        (torch.float32, "cuda", 2048, True, "triton"),
        (torch.float32, "cuda", 2047, True, "cpu"),
        (torch.bfloat16, "cuda", 9999, False, "cpu"),
        (torch.float32, "cpu", 9999, True, "cpu"),
        (torch.float64, "cuda", 9999, True, "reference"),
    ],
)
def test_auto_is_told_by_the_shape_alone(dtype: torch.dtype, device: str, rows: int, fits: bool, taken: str) -> None:
    assert dispatch.automatic(dtype, torch.device(device), rows=rows, fits_triton=fits) == taken


def test_keys_go_round_when_all_ranks_rows_take_over_a_gibibyte_and_no_rank_must_see_them_all() -> None:
    def goes_round(chosen: str, num_bytes: int, has_neighbours: bool = False) -> bool:
        return dispatch.goes_round("gaussian_propagate", chosen, num_bytes, has_neighbours=has_neighbours)

    assert not goes_round("cpu", 2**30)
    assert goes_round("cpu", 2**30 + 1)
    assert goes_round("triton", 2**30 + 1)
    assert not goes_round("reference", 2**30 + 1)
    assert not goes_round("cpu", 2**30 + 1, has_neighbours=True)


@pytest.mark.parametrize("gpu", [(7, 5)], indirect=True)
@pytest.mark.usefixtures("gpu")
def test_an_old_gpu_is_named_once_and_torch_does_the_work(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert dispatch.choose("pearson", "auto", ON_GPU, rows=4096) == "cpu"
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "a GPU is older than the Triton kernels' tiles (compute capability 8.0): PyTorch does the work"
    ]
    with pytest.raises(ValueError, match="older than"):
        dispatch.choose("pearson", "triton", ON_GPU, rows=4096)


def test_fp32_products_are_split_in_three_unless_full_ones_are_asked_for() -> None:
    from scinet_kernels.gaussian_triton import input_precision

    assert input_precision(torch.device("cuda"), "auto") == ("ieee" if torch.version.hip else "tf32x3")
    assert input_precision(torch.device("cuda"), "ieee") == "ieee"
    x = torch.eye(3)
    assert torch.equal(gaussian_propagate(x, x, bandwidth=1, precision="ieee"), gaussian_propagate(x, x, bandwidth=1))
    with pytest.raises(ValueError, match="'ieee'"):
        gaussian_propagate(x, x, bandwidth=1, precision="tf32")
