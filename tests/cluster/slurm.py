"""A real Slurm (slurmctld, slurmd and munge, from Debian's packages) on simulated hosts.

    with Hosts(2) as hosts, Slurm(hosts) as slurm:
        job = slurm.submit(["--nodes=2", "script.sh"], folder=folder)
        slurm.wait(job, "COMPLETED", limit_s=60)

Every node says that it has 8 GPUs and 64 cores. No cgroups, no accounting.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tests.cluster.hosts import NETWORK, Hosts, wait_until

PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
}
GPUS = 8
CONFIGURATION = """
ClusterName=simulated
SlurmctldHost=node-1({network}.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=/run/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SchedulerParameters=sched_interval=2,batch_sched_delay=0
KillWait=30
MinJobAge=3600
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeAddr={address} CPUs=64 RealMemory=20000 Gres=gpu:{gpus} State=UNKNOWN"


class Slurm:
    """One partition of all the hosts; the controller runs on the first."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self._first = hosts.names[0]
        self._folder = hosts.folder / "slurm"
        self._environment = {"SLURM_CONF": str(self._folder / "slurm.conf")}

    def __enter__(self) -> Slurm:
        (self._folder / "state").mkdir(parents=True)
        key = self._folder / "munge.key"
        key.write_bytes(bytes(range(64)))
        key.chmod(0o400)
        nodes = [
            NODE.format(name=name, address=f"{NETWORK}.{number}", gpus=GPUS)
            for number, name in enumerate(self._hosts.names, 1)
        ]
        configuration = CONFIGURATION.format(network=NETWORK, folder=self._folder, nodes="\n".join(nodes))
        (self._folder / "slurm.conf").write_text(configuration)
        for number in range(GPUS):  # a device is a file that is there
            (self._folder / f"gpu{number}").touch()
        (self._folder / "gres.conf").write_text(f"Name=gpu File={self._folder}/gpu[0-{GPUS - 1}]\n")
        for name in self._hosts.names:
            run = [f"--{what}=/run/munge.{what}" for what in ("socket", "pid-file", "log-file", "seed-file")]
            self._command(name, ["munged", "--force", f"--key-file={key}", *run])
        self._command(self._first, ["slurmctld"])
        for name in self._hosts.names:
            self._command(name, ["slurmd", "-N", name])
        wait_until(self._is_idle, limit_s=60, what="all nodes of Slurm idle")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Its daemons end with their hosts."""
        if error is not None:
            print((self._folder / "slurmctld.log").read_text()[-3000:])

    def submit(self, words: Sequence[str], *, folder: Path, **environment: str) -> str:
        """The number of a new job: `sbatch` with `words`, in `folder`."""
        said = self._command(self._first, ["sbatch", "--parsable", *words], folder=folder, **environment)
        return said.strip().splitlines()[-1]

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of a job, by name: JobState, ExitCode, Restarts ..."""
        said = self._command(self._first, ["scontrol", "--oneliner", "show", "job", job], quiet=True)
        return dict(re.findall(r"(\w[\w/:]*)=(\S*)", said))

    def wait(self, job: str, *states: str, limit_s: float) -> dict[str, str]:
        """What Slurm says of a job once it is in one of these states."""
        wait_until(
            lambda: self.job(job)["JobState"] in states, limit_s=limit_s, what=f"job {job} {' or '.join(states)}"
        )
        return self.job(job)

    def signal(self, job: str, name: str) -> None:
        """Send the signal to every task of a job.

        scancel says by its exit code only whether the job was still there when it had asked every node.
        """
        words = ["scancel", f"--signal={name}", job]
        self._hosts.run(self._first, words, limit_s=120, **self._environment)

    def tell(self, *command: str) -> str:
        """What another command of Slurm says, on the first node."""
        return self._command(self._first, list(command))

    def _is_idle(self) -> bool:
        states = self._command(self._first, ["sinfo", "--noheader", "--Node", "--format=%T"]).split()
        return len(states) == len(self._hosts.names) and set(states) == {"idle"}

    def _command(
        self,
        name: str,
        command: Sequence[str],
        *,
        folder: Path | None = None,
        quiet: bool = False,
        **environment: str,
    ) -> str:
        environment |= self._environment
        done = self._hosts.run(name, command, limit_s=120, folder=folder, quiet=quiet, **environment)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}"
        return done.stdout
