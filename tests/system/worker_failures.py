"""A rank of a training that is one collective, which one rank never enters: ``worker_failures.py RANK HOW WORDS``."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch

from scinet import running, train
from scinet.distributed import Ranks, sum_over_ranks
from scinet.errors import DataError, LoaderLost


def _fails(how: str) -> None:
    if how in ("data", "data-asleep"):
        raise DataError("a broken shard")
    if how == "loader":
        raise LoaderLost("a loader process was killed")
    os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])


def main() -> int:
    failing, how, *words = sys.argv[1:]

    def run(_options: Any, ranks: Ranks, *_: Any) -> dict[str, Any]:
        sum_over_ranks(torch.ones(1), ranks)  # all have met
        if ranks.rank == int(failing):
            _fails(how)
        if how == "data-asleep":
            time.sleep(300)  # as in NCCL, which does not notice that a rank has ended
        sum_over_ranks(torch.ones(1), ranks)
        return {}

    running._run = run  # type: ignore[assignment]
    return train.main(words)


if __name__ == "__main__":
    sys.exit(main())
