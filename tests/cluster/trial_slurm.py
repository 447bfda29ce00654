"""A Slurm of one controller and two nodes on this machine, to try ``train.sbatch`` by hand.

Needs root and Debian's slurmctld, slurmd, slurm-client and munge; so it is no test that CI runs. From the clone:

    python -m tests.cluster.trial_slurm 'sbatch --version' 'sinfo'

runs the commands on the controller, one after the other, each by a shell; the current folder is shared by all nodes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.cluster.hosts import Host, network

_CONFIGURATION = """
ClusterName=trial
SlurmctldHost={controller.name}({controller.address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=30
KillWait=30
MinJobAge=300
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=90
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def main(commands: list[str]) -> int:
    """Set the cluster up, run the commands, and take it down."""
    with tempfile.TemporaryDirectory() as name, network(3) as hosts:
        folder = Path(name)
        folder.chmod(0o755)
        controller, workers = hosts[2], hosts[:2]
        environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        _configure(folder, controller, workers)
        _start_munge(folder)
        try:
            controller.start(["slurmctld", "-D"], folder / "controller.out", environment)
            for host in workers:
                host.start(["slurmd", "-D", "-N", host.name], folder / f"{host.name}.out", environment)
            time.sleep(5)
            statuses = []
            for command in commands:
                print(f"$ {command}", flush=True)
                log = folder / "command.out"
                statuses.append(controller.start(["bash", "-c", command], log, environment).wait())
                print(log.read_text(), flush=True)
            if any(statuses):
                for path in folder.glob("*.log"):
                    print(f"{path.name}:\n{path.read_text()[-2000:]}")
            return max(statuses)
        finally:
            os.kill(int((folder / "munge.pid").read_text()), 15)


def _configure(folder: Path, controller: Host, workers: list[Host]) -> None:
    cores = os.cpu_count() or 1
    nodes = "\n".join(
        f"NodeName={host.name} NodeAddr={host.address} CPUs={cores} Gres=gpu:1 State=UNKNOWN" for host in workers
    )
    text = _CONFIGURATION.format(controller=controller, folder=folder, nodes=nodes)
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "state").mkdir()


def _start_munge(folder: Path) -> None:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    words = [f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"]
    words += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed", "--force"]
    subprocess.run(["munged", *words], check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
