"""The manifests for Kubernetes and Ray: by their own schemas, and by what our commands make of them.

The schemas of the custom resources are not at hand here: what lies within them, jobs and pods, is checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from scinet import config
from scinet_cluster import launch, sweep
from scinet_cluster.nodes import find
from scinet_cluster.sweeps import options, placement, trainable

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster/kubernetes"
RAY = ROOT / "cluster/ray"
VERSION = "1.37"
TRAINING = ("jobset", "pytorchjob")
ALL = (*TRAINING, "rayjob")


def _read(name: str) -> list[dict[str, Any]]:
    folder = RAY if name == "rayjob" else FOLDER
    return list(yaml.safe_load_all((folder / f"{name}.yaml").read_text()))


def _pods(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        if "containers" in tree:
            yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for child in tree:
            yield from _pods(child)


def _pods_with_gpus(name: str) -> list[dict[str, Any]]:
    (document,) = _read(name)
    return [pod for pod in _pods(document) if "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]]


def _words(name: str) -> list[str]:
    """Return what the manifest gives ``scinet-launch``."""
    (container,) = _pods_with_gpus(name)[0]["containers"]
    assert container["command"] == ["scinet-launch"], "the container's first process hears SIGTERM"
    return [str(word) for word in container["args"]]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_every_manifest_is_known_to_the_tests() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == {*TRAINING, "volumes"}
    assert {path.stem for path in RAY.iterdir()} == {"rayjob", "cluster"}


def test_volumes_are_what_kubernetes_takes() -> None:
    for document in _read("volumes"):
        kubernetes_validate.validate(document, VERSION, strict=True)


@pytest.mark.parametrize("name", ALL)
def test_pods_are_what_kubernetes_takes(name: str) -> None:
    pods = list(_pods(_read(name)))
    assert pods
    for pod in pods:
        document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": pod}
        kubernetes_validate.validate(document, VERSION, strict=True)


def test_jobs_of_the_jobset_are_what_kubernetes_takes() -> None:
    (document,) = _read("jobset")
    (replicated,) = document["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, **replicated["template"]}
    kubernetes_validate.validate(job, VERSION, strict=True)


@pytest.mark.parametrize("name", ALL)
def test_pods_have_no_rights_they_do_not_need(name: str) -> None:
    for pod in _pods(_read(name)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert not pod.get("hostNetwork")
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }


@pytest.mark.parametrize("name", ALL)
def test_pods_that_train_share_the_runs_and_have_time_and_memory(name: str) -> None:
    claims = {document["metadata"]["name"] for document in _read("volumes")}
    pods = _pods_with_gpus(name)
    assert pods
    grace_s = trainable.GRACE_S if name == "rayjob" else launch.parse(_words(name)).grace_s
    for pod in pods:
        assert pod["terminationGracePeriodSeconds"] > grace_s
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert {mounts[path]["persistentVolumeClaim"]["claimName"] for path in ("/data", "/runs")} == claims


@pytest.mark.parametrize("name", TRAINING)
def test_configuration_is_one_that_the_training_command_takes(name: str) -> None:
    script, *words = launch.parse(_words(name)).command
    assert script == "scinet/train.py"
    joined = " ".join(words).replace("--config=", "--config ").replace("--resume=", "--resume ").split()
    assert joined[0] == "--config"
    assert joined[2:4] == ["--resume", "auto"]
    assert config.load(Path(joined[1]), joined[4:]).output == "/runs"


def test_sweep_of_the_rayjob_is_one_that_its_command_takes_and_its_workers_hold() -> None:
    (document,) = _read("rayjob")
    words = document["spec"]["entrypoint"].partition("exec scinet-sweep ")[2].split()
    told = sweep.parser().parse_intermixed_args(words)
    assert told.resume, "a further try of the job goes on"
    assert told.address == "auto"
    made = options.load(told.config, told.overrides)
    assert made.options.output.startswith("/runs/")
    (pod,) = _pods_with_gpus("rayjob")
    limits = pod["containers"][0]["resources"]["limits"]
    wanted = placement.demanded(made.options.resources)
    assert wanted == {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}
    head = document["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert "/runs" in {mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}


def test_cluster_of_machines_is_one_that_ray_takes() -> None:
    given = yaml.safe_load((RAY / "cluster.yaml").read_text())
    prepared = prepare_config(given)
    validate_config(prepared)
    assert not prepared["setup_commands"], "nothing is installed behind the lock's back"
    assert "--head" in prepared["head_start_ray_commands"][-1]


def test_pods_of_the_jobset_find_each_other() -> None:
    (document,) = _read("jobset")
    (replicated,) = document["spec"]["replicatedJobs"]
    job, name = replicated["template"]["spec"], document["metadata"]["name"]
    (pod,) = _pods(job)
    for index in range(job["completions"]):
        nodes = find(launch.parse(_words("jobset")).wish, {"JOB_COMPLETION_INDEX": str(index)})
        assert (len(nodes.ranks), nodes.node_rank) == (job["parallelism"], index)
        # job 0, pod 0 of the only replicated job, in the service that JobSet names after itself
        assert nodes.master_addr == f"{name}-{replicated['name']}-0-0.{name}"
        assert nodes.master_port == pod["containers"][0]["ports"][0]["containerPort"]


def test_pods_of_the_pytorchjob_find_each_other() -> None:
    (document,) = _read("pytorchjob")
    replicas = document["spec"]["pytorchReplicaSpecs"]
    (port,) = replicas["Master"]["template"]["spec"]["containers"][0]["ports"]
    assert port["name"] == "pytorchjob-port"
    number = sum(replica["replicas"] for replica in replicas.values())
    for index in range(number):
        environment = {  # as the operator's envvar.go makes it
            "MASTER_ADDR": f"{document['metadata']['name']}-master-0",
            "MASTER_PORT": str(port["containerPort"]),
            "PET_NNODES": str(number),
            "PET_NODE_RANK": str(index),
            "PET_NPROC_PER_NODE": document["spec"]["nprocPerNode"],
        }
        nodes = find(launch.parse(_words("pytorchjob")).wish, environment)
        assert (nodes.ranks, nodes.node_rank, nodes.master_port) == ((8,) * number, index, port["containerPort"])
        assert nodes.master_addr == "scinet-master-0"


def test_only_what_a_restart_cures_starts_again() -> None:
    (jobset,), (pytorchjob,) = _read("jobset"), _read("pytorchjob")
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [1, 2])
    assert job["backoffLimit"] == 0
    assert [rule["action"] for rule in jobset["spec"]["failurePolicy"]["rules"]] == ["FailJobSet", "RestartJobSet"]
    assert jobset["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    # the operator's meaning of ExitCode is ours: 1 to 127 are final
    replicas = pytorchjob["spec"]["pytorchReplicaSpecs"].values()
    assert [replica["restartPolicy"] for replica in replicas] == ["ExitCode", "ExitCode"]
    assert launch.FIRST_CURABLE == 128
