"""Which nodes train together, and which of them this is: from options, a hostfile, Slurm or Kubernetes."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scinet.errors import ConfigError, nearest
from scinet_cluster.addresses import own_addresses, own_names, resolved

DEFAULT_PORT = 29500  # where ranks of several nodes meet unless told otherwise; torchrun and DeepSpeed use it too
LOOPBACK = "127.0.0.1"
_NUM_JOB_PORTS = 1000


@dataclass(frozen=True)
class Wish:
    """What the command line says about nodes; None where it says nothing."""

    nodes: int | None = None
    node_rank: int | None = None
    hostfile: Path | None = None
    master_addr: str | None = None
    master_port: int | None = None
    ranks_per_node: int | None = None


@dataclass(frozen=True)
class Nodes:
    """All nodes that train together, seen from one of them.

    Attributes:
        ranks: how many ranks each node runs, 0 where every node counts its own GPUs and all have equally many.
        node_rank: which of them this is.
        master_addr: the host of rank 0.
        master_port: where the ranks meet there; None: any free one, for a single node.
        neighbour: a host that this node reaches by the network of the training; None where gloo finds that by itself.
    """

    ranks: tuple[int, ...]
    node_rank: int
    master_addr: str
    master_port: int | None
    neighbour: str | None


def find(wish: Wish, environment: Mapping[str, str]) -> Nodes:
    """Return the nodes that the command line names, else Slurm's or Kubernetes', else this one alone.

    Raises:
        ConfigError: they are not described in full, or contradict each other.
    """
    if wish.hostfile is not None:
        return _from_hostfile(wish, wish.hostfile)
    if wish.nodes is not None:
        return _from_options(wish, wish.nodes, environment)
    if wish.node_rank is not None:
        raise ConfigError(
            f"--node-rank {wish.node_rank} says which node this is, but neither --nodes nor --hostfile of how many"
        )
    if "SLURM_STEP_NODELIST" in environment:
        return _from_slurm(wish, environment)
    if "PET_NODE_RANK" in environment:
        return _from_kubeflow(wish, environment)
    return Nodes((wish.ranks_per_node or 0,), 0, wish.master_addr or LOOPBACK, wish.master_port, LOOPBACK)


def _checked_rank(node_rank: int, num_nodes: int, said_by: str) -> int:
    if not 0 <= node_rank < num_nodes:
        raise ConfigError(f"{said_by} is {node_rank}, but {num_nodes} node(s) are numbered 0 to {num_nodes - 1}")
    return node_rank


def _from_options(wish: Wish, num_nodes: int, environment: Mapping[str, str]) -> Nodes:
    if num_nodes < 1:
        raise ConfigError(f"--nodes is {num_nodes}, but must be at least 1")
    ranks = (wish.ranks_per_node or 0,) * num_nodes
    if num_nodes == 1:
        _checked_rank(wish.node_rank or 0, 1, "--node-rank")
        return Nodes(ranks, 0, wish.master_addr or LOOPBACK, wish.master_port, LOOPBACK)
    if wish.master_addr is None:
        raise ConfigError(
            f"--nodes {num_nodes} needs --master-addr: the name or address of node 0, the same on every node"
        )
    # the index of a pod in an indexed Job, and so in a JobSet
    index = environment.get("JOB_COMPLETION_INDEX")
    if wish.node_rank is None and index is None:
        raise ConfigError(f"--nodes {num_nodes} needs --node-rank: which of them this is, 0 to {num_nodes - 1}")
    is_pod = wish.node_rank is None
    rank = int(index or 0) if wish.node_rank is None else wish.node_rank
    rank = _checked_rank(rank, num_nodes, "JOB_COMPLETION_INDEX" if is_pod else "--node-rank")
    return Nodes(ranks, rank, wish.master_addr, wish.master_port or DEFAULT_PORT, None if is_pod else wish.master_addr)


def _from_hostfile(wish: Wish, path: Path) -> Nodes:
    if wish.nodes is not None or wish.ranks_per_node is not None:
        other = "--nodes" if wish.nodes is not None else "--ranks-per-node"
        raise ConfigError(f"{path} says how many nodes and ranks there are: leave {other} out")
    slots = read_hostfile(path)
    hosts = list(slots)
    if wish.node_rank is None:
        rank = _own_place(hosts, path)
    else:
        rank = _checked_rank(wish.node_rank, len(hosts), "--node-rank")
    port = wish.master_port or (DEFAULT_PORT if len(hosts) > 1 else None)
    master = wish.master_addr or hosts[0]
    return Nodes(tuple(slots.values()), rank, master, port, _neighbour(hosts, rank, master))


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the number of ranks by host, in the order of a file in DeepSpeed's format (``host slots=8``, # comments).

    Raises:
        ConfigError: the file is missing, empty or not of that format.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"hostfile {path} cannot be read: {reason}") from error
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#", 1)[0].strip()
        if not words:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", words)
        if match is None:
            raise ConfigError(f"line {number} of {path} is '{words}', but must be of the form 'host slots=8'")
        if match[1] in slots:
            raise ConfigError(
                f"line {number} of {path} names {match[1]} a second time: one line a host, all its slots on it"
            )
        slots[match[1]] = int(match[2])
    if not slots:
        raise ConfigError(f"{path} names no host: write a line 'host slots=8' for each")
    return slots


def _own_place(hosts: Sequence[str], path: Path) -> int:
    """Return the index of this machine among hosts given by name or address."""
    names, addresses = own_names(), own_addresses()
    found = [index for index, host in enumerate(hosts) if host in names or host in addresses]
    if not found:
        found = [index for index, host in enumerate(hosts) if set(resolved(host)) & set(addresses)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(hosts)
    if found:
        both = " and ".join(hosts[index] for index in found)
        raise ConfigError(f"{both} of {path} are both this machine: say with --node-rank which this is")
    guess = nearest(socket.gethostname(), hosts)
    raise ConfigError(
        f"this machine, {socket.gethostname()}, is not in {path}, which names {listed}"
        f"{guess or ': write it as it is there, or give --node-rank'}"
    )


def _neighbour(hosts: Sequence[str], rank: int, master: str) -> str:
    """The way to another host tells this node's network, where its own name may lead to the loopback (Debian)."""
    return hosts[1] if rank == 0 and len(hosts) > 1 else master


def _from_slurm(wish: Wish, environment: Mapping[str, str]) -> Nodes:
    hosts = expand_nodelist(environment["SLURM_STEP_NODELIST"])
    num_tasks = int(environment.get("SLURM_STEP_NUM_TASKS", len(hosts)))
    if num_tasks != len(hosts):
        raise ConfigError(
            f"srun started {num_tasks} tasks on {len(hosts)} node(s), but scinet-launch starts the ranks of a node"
            " itself: give srun --ntasks-per-node=1"
        )
    rank = _checked_rank(int(environment["SLURM_NODEID"]), len(hosts), "SLURM_NODEID")
    master = wish.master_addr or (hosts[0] if len(hosts) > 1 else LOOPBACK)
    port = wish.master_port
    if port is None and len(hosts) > 1:
        # jobs that share a node do not meet at one port
        port = DEFAULT_PORT + int(environment.get("SLURM_JOB_ID", "0")) % _NUM_JOB_PORTS
    return Nodes((wish.ranks_per_node or 0,) * len(hosts), rank, master, port, _neighbour(hosts, rank, master))


def expand_nodelist(text: str) -> list[str]:
    """Return the hosts of Slurm's short form, as ``scontrol show hostnames`` prints them (containers often lack it).

    Args:
        text: for example ``a[1-3,07],b2,rack[0-1]n[1-2]``.

    Raises:
        ConfigError: it is not of that form.
    """
    if not re.fullmatch(r"[^\[\],]+(\[[\d,-]+\][^\[\],]*)*(,[^\[\],]+(\[[\d,-]+\][^\[\],]*)*)*", text):
        raise ConfigError(f"SLURM_STEP_NODELIST is '{text}', which is not of the form host[1-3,7]")
    hosts: list[str] = []
    for entry in re.findall(r"(?:[^\[\],]|\[[^\]]*\])+", text):
        found = [""]
        for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", entry):
            parts = [plain] if plain else [number for span in ranges.split(",") for number in _numbers(span)]
            found = [head + part for head in found for part in parts]
        hosts += found
    return hosts


def _numbers(span: str) -> list[str]:
    """``08-10`` -> 08, 09, 10."""
    first, _, last = span.partition("-")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]


def _from_kubeflow(wish: Wish, environment: Mapping[str, str]) -> Nodes:
    """Kubeflow's PyTorchJob and TrainJob describe a pod to torchrun by PET_* (RANK counts pods, not ranks)."""
    num_nodes, per_node = environment.get("PET_NNODES", ""), environment.get("PET_NPROC_PER_NODE", "")
    if not num_nodes.isdecimal():
        raise ConfigError(f"PET_NNODES is '{num_nodes}', but a number is needed: leave the job's elasticPolicy out")
    rank = _checked_rank(int(environment["PET_NODE_RANK"]), int(num_nodes), "PET_NODE_RANK")
    ranks = wish.ranks_per_node or (int(per_node) if per_node.isdecimal() else 0)
    master = wish.master_addr or environment.get("PET_MASTER_ADDR") or environment.get("MASTER_ADDR")
    if master is None:
        raise ConfigError("PET_NODE_RANK is set, but no MASTER_ADDR: give the job a Master replica, or --master-addr")
    port = wish.master_port or int(environment.get("PET_MASTER_PORT", environment.get("MASTER_PORT", DEFAULT_PORT)))
    return Nodes((ranks,) * int(num_nodes), rank, master, port, None)
