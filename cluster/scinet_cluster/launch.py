"""Start one rank a GPU on this node and see them through: ``scinet-launch -- scinet/train.py --config F``.

The one place that turns nodes and GPUs into processes. DeepSpeed's launcher and torchrun make every exit status 1, so
that a scheduler cannot tell what a restart cures from what it repeats, and do not pass a scheduler's SIGTERM on.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scinet.errors import FIRST_CURABLE, ConfigError, ScinetError, nearest
from scinet_cluster.addresses import free_port, interface_towards
from scinet_cluster.nodes import Nodes, Wish, find
from scinet_cluster.supervise import Outcome, Start, end_with, run_ranks, signals_held

GRACE_S = 90.0
_COUNT_GPUS = "import torch; print(torch.cuda.device_count())"
_MEANINGS = {
    1: "it failed in a way that a restart repeats",
    2: "the command or its configuration is wrong",
    130: "interrupted; with --resume auto the same command goes on",
    142: "another rank was lost or hung; with --resume auto the same command goes on",
    143: "stopped by SIGTERM; with --resume auto the same command goes on",
}
_EPILOG = """examples:
  scinet-launch -- scinet/train.py --config configs/quickstart.yaml --resume auto
  scinet-launch --hostfile hosts -- scinet/train.py --config configs/coco2014.yaml      # on each host of the file
  scinet-launch --nodes 2 --node-rank 0 --master-addr 10.0.0.1 -- scinet/train.py --config configs/coco2014.yaml
  srun --ntasks-per-node=1 scinet-launch -- scinet/train.py --config configs/coco2014.yaml
  scinet-launch --ranks-per-node 2 --restarts 3 -- scinet/train.py --config configs/quickstart.yaml --resume auto
"""


@dataclass(frozen=True)
class Job:
    """What to start: where, what, and how patiently."""

    wish: Wish
    command: tuple[str, ...]
    grace_s: float
    restarts: int
    parent: int | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the most informative exit status of this node's ranks, or 2 for wrong usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    with signals_held():
        try:
            job = parse(words)
            if job.parent is not None:
                end_with(job.parent)
            return _run(job)
        except ScinetError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scinet-launch",
        usage="%(prog)s [options] -- scinet/train.py [arguments]",
        description="Start one rank a GPU (or one) on this node, pass signals on, leave no process behind.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--nodes",
        type=int,
        metavar="N",
        help="how many nodes train together (default: what Slurm or Kubeflow says, or 1)",
    )
    add(
        "--node-rank",
        type=int,
        metavar="I",
        help="which of them this is, from 0 (default in an indexed Job: its index)",
    )
    add("--hostfile", type=Path, metavar="F", help="instead: one line 'host slots=8' for each node")
    add("--master-addr", metavar="A", help="name or address of node 0, as all nodes know it")
    add(
        "--master-port",
        type=int,
        metavar="P",
        help="where the ranks meet (several nodes: 29500, by job id within Slurm)",
    )
    add("--ranks-per-node", type=int, metavar="K", help="(default: the number of GPUs, or 1)")
    add(
        "--grace", type=float, default=GRACE_S, metavar="SECONDS", help="from SIGTERM to SIGKILL (default: %(default)g)"
    )
    add("--restarts", type=int, default=0, metavar="N", help="one node only: start again on statuses >= 128, N times")
    add(
        "--parent",
        type=int,
        metavar="PID",
        help="of the process that starts this one: end, as by SIGTERM, with it",
    )
    return parser


def parse(words: Sequence[str]) -> Job:
    """Return what the command line asks for.

    Raises:
        ConfigError: it cannot be carried out as written.
    """
    own, command = list(words), []
    if "--" in words:
        own, command = list(words[: words.index("--")]), list(words[words.index("--") + 1 :])
    told, rest = _parser().parse_known_args(own)
    if rest and rest[0].startswith("-"):
        known = ["--" + name.replace("_", "-") for name in vars(told)]
        hint = nearest(rest[0].split("=")[0], known)
        raise ConfigError(f"unknown option {rest[0]}{hint or ': what belongs to the training command goes after `--`'}")
    if rest or not command:
        raise ConfigError("no training command after `--`: write scinet-launch [options] -- scinet/train.py --config F")
    script = Path(command[0])
    if not script.is_file():
        hint = nearest(command[0], [str(path) for path in script.parent.glob("*.py")])
        raise ConfigError(f"the first word after `--` is '{command[0]}', but must be a Python file{hint}")
    for name, value, lowest in (
        ("--ranks-per-node", told.ranks_per_node, 1),
        ("--master-port", told.master_port, 1),
        ("--grace", told.grace, 0),
        ("--restarts", told.restarts, 0),
        ("--parent", told.parent, 1),
    ):
        if value is not None and not value >= lowest:
            raise ConfigError(f"{name} is {value:g}, but must be at least {lowest}")
    wish = Wish(told.nodes, told.node_rank, told.hostfile, told.master_addr, told.master_port, told.ranks_per_node)
    return Job(wish, tuple(command), told.grace, told.restarts, told.parent)


def _run(job: Job) -> int:
    nodes = find(job.wish, os.environ)
    if job.restarts and len(nodes.ranks) > 1:
        # a node started again by itself would meet ranks of the others that have not yet noticed the loss
        raise ConfigError(
            f"--restarts {job.restarts} is for one node, but {len(nodes.ranks)} train together: only what sees all of"
            " them (Slurm, Kubernetes) knows when the old ranks are gone everywhere, and starts them all again"
        )
    if nodes.ranks[nodes.node_rank] == 0:
        nodes = replace(nodes, ranks=(max(_num_gpus(), 1),) * len(nodes.ranks))
    for left in range(job.restarts, -1, -1):
        outcome = run_ranks(_starts(job, nodes), grace_s=job.grace_s)
        _say(outcome)
        if outcome.status < FIRST_CURABLE or outcome.is_stopped:
            break
        if left:
            print(f"scinet-launch: starting again, {left - 1} restart(s) left after this", file=sys.stderr, flush=True)
    return outcome.status


def _num_gpus() -> int:
    """Ask torch, in another process: this one lives as long as the training and should not hold torch, or a GPU."""
    counted = subprocess.run([sys.executable, "-c", _COUNT_GPUS], capture_output=True, text=True, check=False)
    if counted.returncode:
        raise ConfigError(f"torch cannot count the GPUs: {counted.stderr.strip()[-300:]}: give --ranks-per-node")
    return int(counted.stdout)


def _starts(job: Job, nodes: Nodes) -> list[Start]:
    """Return this node's ranks, whose environment is what ``torch.distributed`` calls ``env://``."""
    here = nodes.ranks[nodes.node_rank]
    first = sum(nodes.ranks[: nodes.node_rank])
    shared = _shared_environment(nodes, os.environ)
    starts = []
    for local in range(here):
        own = {"RANK": str(first + local), "LOCAL_RANK": str(local)}
        starts.append(Start(first + local, [sys.executable, *job.command], {**shared, **own}))
    return starts


def _shared_environment(nodes: Nodes, environment: Mapping[str, str]) -> dict[str, str]:
    here = nodes.ranks[nodes.node_rank]
    shared = {
        **environment,
        "WORLD_SIZE": str(sum(nodes.ranks)),
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": nodes.master_addr,
        "MASTER_PORT": str(nodes.master_port or free_port()),
    }
    # ranks of one node share its cores: threads that wait for a core spin, and slow all of them down
    shared.setdefault("OMP_NUM_THREADS", str(max(len(os.sched_getaffinity(0)) // here, 1)))
    if nodes.neighbour is not None and "GLOO_SOCKET_IFNAME" not in environment:
        # gloo offers the others the address of this machine's own name, which may be the loopback or another network
        shared["GLOO_SOCKET_IFNAME"] = interface_towards(nodes.neighbour)
    return shared


def _say(outcome: Outcome) -> None:
    if outcome.rank is None:
        return
    meaning = _MEANINGS.get(outcome.status, "it failed in a way that a restart repeats")
    if outcome.status > FIRST_CURABLE and outcome.status not in _MEANINGS:
        try:
            name = signal.Signals(outcome.status - FIRST_CURABLE).name
        except ValueError:
            name = f"signal {outcome.status - FIRST_CURABLE}"
        meaning = f"killed by {name}; with --resume auto the same command goes on"
    line = f"scinet-launch: rank {outcome.rank} on {socket.gethostname()} ended with status {outcome.status}: {meaning}"
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
