"""Names, addresses and interfaces of this machine."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from scinet.errors import ConfigError


def own_names() -> frozenset[str]:
    """Return the names this machine calls itself."""
    full = socket.getfqdn()
    return frozenset({socket.gethostname(), socket.gethostname().split(".")[0], full, full.split(".")[0], "localhost"})


def own_addresses() -> dict[str, str]:
    """Return this machine's interfaces by their IP addresses."""
    return {
        address.address.split("%")[0]: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }


def resolved(host: str) -> list[str]:
    """Return the IP addresses of a name or address, none if it has none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [str(entry[4][0]).split("%")[0] for entry in found]


def free_port() -> int:
    """Return a port on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def interface_towards(host: str) -> str:
    """Return the interface by which this machine reaches a host.

    Args:
        host: its name or address; this machine's own gives the interface that bears it.

    Raises:
        ConfigError: the host is unknown, cannot be reached, or its name means another machine on every machine.
    """
    addresses = resolved(host)
    if not addresses:
        raise ConfigError(f"the host '{host}' has no address on this machine: check its name, or give an IP address")
    reasons = []
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, 9))  # only looks up the route: a datagram socket sends nothing here
            except OSError as error:
                reasons.append(f"{address}: {error.strerror}")
                continue
            own = str(probe.getsockname()[0]).split("%")[0]
        if ipaddress.ip_address(own).is_loopback and host != "localhost" and host != address:
            raise ConfigError(
                f"'{host}' means {address} on this machine, where no other can reach it: give node 0's address on"
                " the network that all nodes share as --master-addr"
            )
        interfaces = own_addresses()
        if own in interfaces:
            return interfaces[own]
        reasons.append(f"{address}: no interface bears {own}")
    raise ConfigError(f"the host '{host}' cannot be reached from this machine ({'; '.join(reasons)})")
