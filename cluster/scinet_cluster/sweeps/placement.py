"""What a trial wants of a Ray cluster, and whether that is there."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import Iterator
from typing import Any

import ray
from ray import tune

from scinet.errors import ConfigError
from scinet_cluster.sweeps.options import ResourceOptions

_OBJECT_STORE_BYTES = 100 * 2**20  # only numbers and short texts travel through Ray

_PATIENCE_S = 10.0


def demanded(options: ResourceOptions) -> dict[str, float]:
    """Return what a trial takes on each of its nodes, by Ray's names."""
    ranks = options.ranks_per_node
    wanted = {
        "CPU": float(ranks * options.cpus_per_rank),
        "GPU": ranks * options.gpus_per_rank,
        "memory": float(int(ranks * options.memory_gb_per_rank * 2**30)),
    }
    return {name: amount for name, amount in wanted.items() if amount}


def bundles(options: ResourceOptions) -> tune.PlacementGroupFactory:
    """Return the placement group of a trial: a bundle a node, on different nodes."""
    return tune.PlacementGroupFactory([demanded(options)] * options.nodes, strategy="STRICT_SPREAD")


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Be on a Ray cluster: that of the address, or one in this process's care that needs no network.

    Raises:
        ConfigError: there is none at the address.
    """
    quiet: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    _probe(address)
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            cores = len(os.sched_getaffinity(0))
            ray.init(
                address="local",
                num_cpus=cores,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                **quiet,
            )
    except (ConnectionError, ValueError, TimeoutError, RuntimeError) as error:
        raise ConfigError(f"--address {address or 'local'}: no Ray cluster answers ({_first_line(error)})") from error
    try:
        yield
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """Ask for the address as such: Ray would try for ten minutes.

    Raises:
        ConfigError: nothing listens there.
    """
    host, colon, port = address.rpartition(":")
    if not colon or "://" in address:
        return
    try:
        with socket.create_connection((host, int(port)), timeout=_PATIENCE_S):
            return
    except (OSError, ValueError) as error:
        raise ConfigError(f"--address {address}: no Ray cluster answers there ({error})") from error


def capacity(options: ResourceOptions) -> int:
    """Return how many trials fit on the nodes at once.

    Raises:
        ConfigError: not one does, even when nothing else runs.
    """
    wanted = demanded(options)
    there = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    fits = sorted((_times(node, wanted) for node in there), reverse=True)
    if len([count for count in fits if count]) < options.nodes:
        listed = "; ".join(_in_words({name: node.get(name, 0.0) for name in wanted}) for node in there)
        raise ConfigError(
            f"a trial wants {_in_words(wanted)} on each of {options.nodes} node(s), Ray has {len(there)} node(s) with "
            f"{listed}: lower resources.nodes, resources.ranks_per_node or {_lacking(there, wanted, options.nodes)}"
        )
    # as many trials as can each have `nodes` different nodes
    trials = sum(fits) // options.nodes
    while trials and sum(min(count, trials) for count in fits) < trials * options.nodes:
        trials -= 1
    return trials


def _times(node: dict[str, float], wanted: dict[str, float]) -> int:
    return min(math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items())


def _lacking(there: list[dict[str, float]], wanted: dict[str, float], num_nodes: int) -> str:
    """Return the options of what too few nodes have enough of; of all of it where none has it together."""
    keys = {"CPU": "cpus_per_rank", "GPU": "gpus_per_rank", "memory": "memory_gb_per_rank"}
    lacking = [name for name in wanted if sum(_times(node, {name: wanted[name]}) > 0 for node in there) < num_nodes]
    return ", ".join(f"resources.{keys[name]}" for name in lacking or wanted)


def _in_words(amounts: dict[str, float]) -> str:
    units = {"memory": (2**30, "GiB of memory"), "CPU": (1, "CPU(s)"), "GPU": (1, "GPU(s)")}
    return ", ".join(f"{amount / units[name][0]:g} {units[name][1]}" for name, amount in amounts.items())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
