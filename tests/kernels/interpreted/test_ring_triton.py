"""The Triton path where keys go round two ranks; gloo sends no GPU tensors, so this runs in the interpreter only."""

import gc
import importlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from scinet_kernels import tiles
from scinet_kernels.tiles import Tile
from tests.kernels.interpreted.conftest import IS_INTERPRETING
from tests.kernels.test_ring import Case, check, largest_gather

CASES = [
    Case("self", exclude_self=True),  # the kernels read `exclude_self` by position: it must not travel
    Case("self", one_bandwidth=False, has_ids=True, has_weights=True, radius=2.5),
    Case("bank", has_ids=True, has_weights=True),
    Case("bank", one_bandwidth=False, apart=30),
]


def _work(rank: int, address: str) -> None:
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # before a group exists: see test_gaussian.py
    for key in list(tiles.TABLE):
        tiles.TABLE[key] = Tile(rows=16, columns=16, inner=16, values=16, num_warps=4, num_stages=2)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    for counts in ([17, 3], [0, 5]):
        for case in CASES:
            with largest_gather(0) as went_round:
                check(case, counts, dist.group.WORLD, backend="triton", dtype=torch.float32, tolerance=3e-5)
                assert went_round() == (2, 2)
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.interpreter
@pytest.mark.multiprocess
@pytest.mark.skipif(not IS_INTERPRETING, reason="gloo sends no GPU tensors: make interpreted")
def test_ranks_equal_one_process_when_their_keys_go_round(tmp_path_factory: pytest.TempPathFactory) -> None:
    address = str(tmp_path_factory.mktemp("gloo") / "store")
    mp.spawn(_work, args=(address,), nprocs=2)
