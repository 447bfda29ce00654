"""Hosts on one machine: network namespaces with a name, an address and a cable each, joined by a switch."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

_OWN_FILES = Path("/etc/netns")  # what `ip netns exec` shows a namespace instead of /etc


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Host:
    """One of them; what runs on it ends with it."""

    def __init__(self, network: Network, index: int) -> None:
        self.name = f"host{index}"
        self.address = f"10.77.0.{index + 1}"
        self.namespace = f"{network.prefix}-{self.name}"
        self._switch = network.switch
        self._port = f"port{index}"
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, command: Sequence[object], log: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
        """Start a command that sees this host's name, network and /etc/hosts; both outputs go to a file."""
        named = f'hostname {self.name} && exec "$@"'
        words = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", named, "sh"]
        with log.open("w") as file:
            process = subprocess.Popen(
                [*words, *(str(word) for word in command)],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                text=True,
            )
        self._processes.append(process)
        return process

    def running(self) -> list[str]:
        """Return the command lines of all that runs in this host's namespace."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.namespace], check=True, capture_output=True, text=True
        ).stdout.split()
        found = []
        for pid in listed:
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
        return found

    def cut_off(self) -> None:
        """Pull the cable at the switch: from now on nothing arrives, and nobody is told."""
        _ip("-n", self._switch, "link", "set", self._port, "down")

    def plug_in(self) -> None:
        """Put the cable back."""
        _ip("-n", self._switch, "link", "set", self._port, "up")

    def end(self) -> None:
        """Kill whatever still runs here."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False)
        for pid in listed.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        for process in self._processes:
            process.kill()
            process.wait()


class Network:
    """A switch and its hosts."""

    def __init__(self) -> None:
        self.prefix = f"scinet{os.getpid()}"
        self.switch = f"{self.prefix}-switch"
        self.hosts: list[Host] = []

    def connect(self, number: int) -> None:
        """Make the switch and plug that many hosts in."""
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "bridge", "up")
        self.hosts = [Host(self, index) for index in range(number)]
        for index, host in enumerate(self.hosts):
            _ip("netns", "add", host.namespace)
            own = _OWN_FILES / host.namespace
            own.mkdir(parents=True)
            # as Debian installs it: a host's own name leads to its loopback
            lines = ["127.0.0.1 localhost", f"127.0.1.1 {host.name}"]
            lines += [f"{other.address} {other.name}" for other in self.hosts if other is not host]
            (own / "hosts").write_text("\n".join(lines) + "\n")
            port = f"port{index}"
            _ip("-n", self.switch, "link", "add", port, "type", "veth", "peer", "eth0", "netns", host.namespace)
            _ip("-n", self.switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")

    def remove(self) -> None:
        """End what runs, and leave no namespace, link or file."""
        for host in self.hosts:
            host.end()
            shutil.rmtree(_OWN_FILES / host.namespace, ignore_errors=True)
        with contextlib.suppress(OSError):
            _OWN_FILES.rmdir()  # if it is ours alone
        for namespace in [*(host.namespace for host in self.hosts), self.switch]:
            # the links lie within the namespaces and go with them
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


@contextlib.contextmanager
def network(number: int) -> Iterator[list[Host]]:
    """Give that many hosts on one network, for as long as the context lasts."""
    made = Network()
    try:
        made.connect(number)
        yield made.hosts
    finally:
        made.remove()
