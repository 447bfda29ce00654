"""Which inner loops the CPU path runs in a test: those in C, which must be there, or those in PyTorch."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from scinet_kernels import native


@contextmanager
def inner_loops(language: str) -> Iterator[pytest.MonkeyPatch]:
    """Run everything within in "C" or in "PyTorch"; gives the patch, which ends with it."""
    with pytest.MonkeyPatch.context() as patch:
        if language == "PyTorch":
            patch.setattr(native, "library", lambda dtype: None)
        else:
            assert native.library(torch.float32) is not None, "the C routines were not built: is gcc installed?"
        yield patch
