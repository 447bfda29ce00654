"""Train SCINet or a baseline: ``deepspeed scinet/train.py --config configs/quickstart.yaml key=value ...``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

EPILOG = """examples:
  deepspeed scinet/train.py --config configs/quickstart.yaml
  deepspeed --num_gpus 2 scinet/train.py --config configs/quickstart.yaml train.epochs=5
  torchrun --nproc-per-node 2 scinet/train.py --config configs/quickstart.yaml name=two-ranks
  python scinet/train.py --config configs/quickstart.yaml method=bce name=baseline
  scinet-launch --restarts 3 -- scinet/train.py --config configs/quickstart.yaml --resume auto
"""


def _leave_own_folder() -> None:
    """Drop ``scinet/`` from the path, where the launcher put it: its modules are no top-level names."""
    own = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.getcwd()) != own]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train SCINet or a baseline on shards made by `scinet data build`.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="a YAML file; without it the defaults hold")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    parser.add_argument(
        "--resume",
        choices=["auto", "never"],
        help="auto: go on with the run that the directory holds, or begin it; never (the default): refuse a directory "
        "that holds one",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0 done, 1 failed in a way that a restart repeats, 2 wrong usage, 130 Ctrl-C; from 128 on starting again with
    ``--resume auto`` goes on: 142 another rank was lost, 143 SIGTERM.
    """
    arguments = _parser().parse_intermixed_args(argv)
    # torch warns of a lost connection with a page of its own stack; what it means, the run says in a sentence
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        from scinet import config, preflight
        from scinet.errors import ScinetError
    except ImportError as error:
        print(f"scinet is not installed in {sys.executable} ({error}): run `pip install -e .`", file=sys.stderr)
        return 2
    speaks = int(os.environ.get("LOCAL_RANK", "0")) == 0
    try:
        given = [] if arguments.resume is None else [f"resume={str(arguments.resume == 'auto').lower()}"]
        options = config.load(arguments.config, [*arguments.overrides, *given])
        preflight.check_start(options, int(os.environ.get("WORLD_SIZE", "1")))
        from scinet import running  # with torch, which no wrong configuration waits for

        speaks = True  # from here on the ranks agree on who does
        running.run(options)
    except ScinetError as error:
        if speaks and not error.is_told:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    _leave_own_folder()
    sys.exit(main())
