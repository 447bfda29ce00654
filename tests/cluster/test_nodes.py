"""Which node this is, by each way of saying it; what is said in part or in contradiction is refused."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from scinet.errors import ConfigError
from scinet_cluster import nodes
from scinet_cluster.addresses import interface_towards
from scinet_cluster.nodes import LOOPBACK, Nodes, Wish, expand_nodelist, find, read_hostfile

SRUN = {
    "SLURM_STEP_NODELIST": "gpu[3-4]",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "5012",
}
POD = {
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_NPROC_PER_NODE": "4",
    "MASTER_ADDR": "t-master-0",
    "MASTER_PORT": "23456",
    "RANK": "1",
    "WORLD_SIZE": "8",
}


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text(f"# two machines\nfar-away slots=8\n\n{socket.gethostname()} slots=2  # this one\n")
    return path


def _names(monkeypatch: pytest.MonkeyPatch, **addresses: str) -> None:
    def lookup(host: str) -> list[str]:
        return [addresses[host]] if host in addresses else []

    monkeypatch.setattr(nodes, "resolved", lookup)


def test_node_is_alone_when_nothing_names_others() -> None:
    assert find(Wish(), {}) == Nodes((0,), 0, LOOPBACK, None, LOOPBACK)
    assert find(Wish(ranks_per_node=3), {"RANK": "5", "WORLD_SIZE": "9"}).ranks == (3,)


def test_nodes_are_those_of_the_options_when_they_contradict_the_environment() -> None:
    wish = Wish(nodes=3, node_rank=2, master_addr="10.0.0.1", master_port=1234, ranks_per_node=8)
    assert find(wish, {**SRUN, **POD}) == Nodes((8, 8, 8), 2, "10.0.0.1", 1234, "10.0.0.1")


def test_node_rank_is_the_pods_index_when_an_indexed_job_runs_it() -> None:
    found = find(Wish(nodes=2, master_addr="train-node-0-0.train"), {"JOB_COMPLETION_INDEX": "1"})
    assert (found.node_rank, found.master_port) == (1, nodes.DEFAULT_PORT)
    assert found.neighbour is None, "the service's name may not be known yet"


def test_nodes_are_the_hostfiles_when_this_machine_is_in_it(hostfile: Path) -> None:
    found = find(Wish(hostfile=hostfile), {})
    assert found == Nodes((8, 2), 1, "far-away", nodes.DEFAULT_PORT, "far-away")
    first = find(Wish(hostfile=hostfile, node_rank=0), {})
    assert first.neighbour == socket.gethostname(), "the first host's own name may lead to its loopback"


def test_node_is_found_by_its_address_when_the_hostfile_gives_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "own_addresses", lambda: {"10.1.0.7": "eth0"})
    path = tmp_path / "hosts"
    path.write_text("10.1.0.6 slots=1\n10.1.0.7 slots=1\n")
    assert find(Wish(hostfile=path), {}).node_rank == 1
    _names(monkeypatch, login="10.1.0.6", alias="10.1.0.7")
    path.write_text("login slots=1\nother slots=1\nalias slots=1\n")
    assert find(Wish(hostfile=path), {}).node_rank == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "names no host"),
        ("# a comment\n", "names no host"),
        ("a slots=2\nb\n", r"line 2 .*'b', but must be of the form 'host slots=8'"),
        ("a slots=0\n", "must be of the form"),
        ("a slots=2\na slots=2\n", "names a a second time"),
    ],
)
def test_hostfile_is_refused_when_it_is_not_one(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_hostfile(path)


def test_example_hostfile_is_one() -> None:
    path = Path(__file__).resolve().parents[2] / "cluster/hostfile.example"
    assert set(read_hostfile(path).values()) == {8}


def test_hosts_are_named_when_this_machine_is_not_among_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hosts"
    path.write_text("gpu-01 slots=8\ngpu-02 slots=8\n")
    _names(monkeypatch)
    monkeypatch.setattr(nodes.socket, "gethostname", lambda: "gpu-2")
    with pytest.raises(ConfigError, match=r"this machine, gpu-2, is not in .*gpu-01, gpu-02; did you mean 'gpu-02'\?"):
        find(Wish(hostfile=path), {})
    path.write_text(f"localhost slots=8\n{socket.getfqdn()} slots=8\n")
    with pytest.raises(ConfigError, match="are both this machine"):
        find(Wish(hostfile=path), {})


@pytest.mark.parametrize(
    ("wish", "complaint"),
    [
        (Wish(nodes=2, node_rank=0), "needs --master-addr"),
        (Wish(nodes=2, master_addr="a"), "needs --node-rank: which of them this is, 0 to 1"),
        (Wish(nodes=2, node_rank=2, master_addr="a"), "--node-rank is 2, but 2 node.s. are numbered 0 to 1"),
        (Wish(nodes=0), "--nodes is 0"),
        (Wish(node_rank=1), "neither --nodes nor --hostfile"),
    ],
)
def test_options_are_refused_when_they_say_too_little(wish: Wish, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        find(wish, {})


def test_hostfile_is_refused_when_options_say_the_same_again(hostfile: Path) -> None:
    for wish in (Wish(nodes=2, hostfile=hostfile), Wish(ranks_per_node=2, hostfile=hostfile)):
        with pytest.raises(ConfigError, match=r"leave --(nodes|ranks-per-node) out"):
            find(wish, {})


def test_nodes_are_slurms_when_srun_started_this() -> None:
    found = find(Wish(), SRUN)
    assert found == Nodes((0, 0), 1, "gpu3", nodes.DEFAULT_PORT + 12, "gpu3")
    assert find(Wish(), {**SRUN, "SLURM_NODEID": "0"}).neighbour == "gpu4"
    assert find(Wish(), {**SRUN, "SLURM_JOB_ID": "5013"}).master_port != found.master_port


def test_srun_is_refused_when_it_starts_a_task_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"16 tasks on 2 node.*--ntasks-per-node=1"):
        find(Wish(), {**SRUN, "SLURM_STEP_NUM_TASKS": "16"})


def test_node_is_alone_when_only_a_batch_script_of_slurm_started_this() -> None:
    assert find(Wish(), {"SLURM_NODEID": "0", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "a[1-2]"}).ranks == (0,)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("vm", ["vm"]),
        ("a[1-3,7],b2", ["a1", "a2", "a3", "a7", "b2"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("rack[0-1]n[1-2]-ib", ["rack0n1-ib", "rack0n2-ib", "rack1n1-ib", "rack1n2-ib"]),
    ],
)
def test_nodelist_is_written_out(text: str, hosts: list[str]) -> None:
    assert expand_nodelist(text) == hosts


@pytest.mark.parametrize("text", ["", "a[1-", "a[x]", "a,,b"])
def test_nodelist_is_refused_when_it_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="not of the form"):
        expand_nodelist(text)


def test_nodes_are_pods_when_kubeflow_started_this() -> None:
    assert find(Wish(), POD) == Nodes((4, 4), 1, "t-master-0", 23456, None)
    assert find(Wish(), {**POD, "PET_NPROC_PER_NODE": "auto"}).ranks == (0, 0)
    assert find(Wish(), {**POD, "PET_NODE_RANK": "0"}).node_rank == 0, "RANK is the operator's own count"


def test_kubeflows_job_is_refused_when_it_is_elastic_or_has_no_master() -> None:
    with pytest.raises(ConfigError, match=r"PET_NNODES is '1:4'.*elasticPolicy"):
        find(Wish(), {**POD, "PET_NNODES": "1:4"})
    with pytest.raises(ConfigError, match="no MASTER_ADDR"):
        find(Wish(), {name: value for name, value in POD.items() if name != "MASTER_ADDR"})


def test_interface_is_the_loopback_when_the_master_is_said_to_be_there() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("localhost") == "lo"


def test_master_is_refused_when_no_other_machine_could_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from scinet_cluster import addresses

    monkeypatch.setattr(addresses, "resolved", lambda host: ["127.0.1.1"])  # Debian's /etc/hosts
    with pytest.raises(ConfigError, match=r"'gpu1' means 127\.0\.1\.1 on this machine"):
        interface_towards("gpu1")
    monkeypatch.setattr(addresses, "resolved", lambda host: [])
    with pytest.raises(ConfigError, match="'gpu1' has no address"):
        interface_towards("gpu1")
