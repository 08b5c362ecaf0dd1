"""Simulated hosts on one machine: network namespaces behind a bridge, each host with its own sshd, processes and disks.

    with Hosts(3) as hosts:
        hosts.run("node-1", ["ssh", "node-2", "hostname"], limit_s=10)
        hosts.cut("node-3")

Needs root, and installs nothing. The network is one that the hosts have among themselves: there is no way out of it.
All hosts share one kernel, one clock and, but for the folders given as `private`, one disk. Everything ends with the
block, and also if the process that holds the block is killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "10.78.0"  # of the simulated hosts, and known to nobody else
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LARGEST_FRAME = 2000.0  # bytes, and more than one
BURST_S = 1.5e-3  # of its time that a throttled cable may be ahead: too little for a late timer, and it is slower
# What each program is in, on Debian.
PACKAGES = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "ip": "iproute2",
    "tc": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "pdsh": "pdsh",
}
# Process 1 of a host. Arguments: folder of the rig, name, address, private folders. It waits for its cable (a line on
# standard input), says that it is up, and then reaps whatever loses its parent.
HOST = r"""
set -eu
rig=$1 name=$2 address=$3; shift 3
hostname "$name"
mount --make-rprivate /
mount -t proc none /proc
mount -t tmpfs none /run
mkdir /run/sshd
mount --bind "$rig/known_hosts_of_the_network" /etc/hosts
mount --bind "$rig/ssh_config" /etc/ssh/ssh_config
for folder in "$@"; do mkdir -p "$folder"; mount -t tmpfs none "$folder"; done
echo waiting
read -r _
ip link set dev lo up
ip address add "$address/24" dev eth0
ip link set dev eth0 up
"$(command -v sshd)" -f "$rig/sshd_config"
echo up
while :; do sleep 3600 & wait $!; done
"""
SSHD = """
Port 22
HostKey {rig}/host_key
AuthorizedKeysFile {rig}/key.pub
PermitRootLogin yes
StrictModes no
UsePAM no
MaxStartups 100
PidFile none
"""
SSH = """
Host *
  IdentityFile {rig}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def missing_packages(packages: dict[str, str]) -> list[str]:
    """The Debian packages of those programs that this machine does not have."""
    path = f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"
    return sorted({package for program, package in packages.items() if shutil.which(program, path=path) is None})


def wait_until(condition: Callable[[], bool], *, limit_s: float, what: str) -> float:
    """The seconds until `condition` holds. Raises AssertionError, naming `what`, after `limit_s`."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit_s, f"not within {limit_s:g} s: {what}"
        time.sleep(0.2)
    return time.monotonic() - started


class Hosts:
    """node-1 ... node-N at 10.78.0.1 ... N, that reach each other by name, by ssh and by pdsh without a password."""

    def __init__(self, count: int, *, private: Sequence[Path] = ()) -> None:
        """Each of the folders `private` is a disk of its own, empty at first, on every host."""
        self.names = [f"node-{number}" for number in range(1, count + 1)]
        self._private = [str(folder) for folder in private]
        self._fabric: subprocess.Popen[str] | None = None
        self._hosts: dict[str, subprocess.Popen[str]] = {}
        self._commands: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Hosts:
        self.folder = Path(tempfile.mkdtemp(prefix="hosts-"))
        try:
            self._write_files()
            self._fabric = self._spawn(["unshare", "--net", "sh", "-c", "echo up; exec sleep infinity"])
            assert self._fabric.stdout is not None
            self._fabric.stdout.readline()
            self._in_fabric("ip", "link", "add", "bridge", "type", "bridge")
            self._in_fabric("ip", "link", "set", "dev", "bridge", "up")
            for name in self.names:
                self.boot(name)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._hosts):
            self.crash(name)
        for process in self._commands:
            process.kill()
            process.wait()
        if self._fabric is not None:
            self._fabric.kill()
            self._fabric.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def boot(self, name: str) -> None:
        """Start a host that is not there or has crashed, with empty private folders."""
        address = f"{NETWORK}.{self.names.index(name) + 1}"
        spaces = ["--mount", "--uts", "--net", "--pid", "--fork", "--kill-child"]
        host = self._spawn(
            ["unshare", *spaces, "bash", "-c", HOST, "host", str(self.folder), name, address, *self._private]
        )
        self._hosts[name] = host
        assert host.stdin is not None
        assert host.stdout is not None
        self._expect(host, "waiting")
        card = f"02:00:00:00:00:{self.names.index(name) + 1:02x}"  # the same after a crash: others remember it
        end = ["peer", "name", "eth0", "address", card, "netns", str(self._first(name))]
        self._in_fabric("ip", "link", "add", name, "type", "veth", *end)
        self._in_fabric("ip", "link", "set", "dev", name, "master", "bridge", "up")
        host.stdin.write("wired\n")
        host.stdin.flush()
        self._expect(host, "up")

    def cut(self, name: str) -> None:
        """Take the host's cable out: no packet passes any more, and nobody is told."""
        self._in_fabric("ip", "link", "set", "dev", name, "down")

    def mend(self, name: str) -> None:
        """Put the cable back."""
        self._in_fabric("ip", "link", "set", "dev", name, "up")

    def throttle(self, name: str, bytes_per_s: float) -> None:
        """Let the host send no more than so many bytes a second, of whole Ethernet frames, from now on."""
        burst = max(LARGEST_FRAME, BURST_S * bytes_per_s)
        rule = ["rate", f"{8 * bytes_per_s:.0f}bit", "burst", f"{burst:.0f}b", "latency", "400ms"]
        inside = ["nsenter", f"--target={self._first(name)}", "--net"]
        command = [*inside, "tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *rule]
        subprocess.run(command, check=True, env=environment_of_hosts(), timeout=30)

    def sent(self, name: str) -> int:
        """Bytes that the host has sent over its cable, headers of large segments counted once."""
        said = Path(f"/proc/{self._first(name)}/net/dev").read_text()
        return next(int(line.split()[9]) for line in said.splitlines() if line.strip().startswith("eth0:"))

    def crash(self, name: str) -> None:
        """End every process of a host at once."""
        host = self._hosts.pop(name)
        if (first := self._first_of(host)) is not None:
            os.kill(first, signal.SIGKILL)
        host.kill()
        host.wait()

    def start(
        self, name: str, command: Sequence[str], *, folder: Path | None = None, log: Path, **environment: str
    ) -> subprocess.Popen[str]:
        """Run a command on a host; all that it says goes to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            process = subprocess.Popen(
                self.on(name, command, folder),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment_of_hosts(**environment),
                start_new_session=True,
            )
        self._commands.append(process)
        return process

    def run(
        self,
        name: str,
        command: Sequence[str],
        *,
        limit_s: float,
        folder: Path | None = None,
        quiet: bool = False,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """What a command said on a host, standard error included, if it ends before `limit_s`.

        It is printed too, for pytest -s and failures, unless `quiet`.
        """
        log = self.folder / f"said-{len(self._commands)}"
        process = self.start(name, command, folder=folder, log=log, **environment)
        started = time.monotonic()
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{command} still runs after {limit_s:g} s, having said:\n{log.read_text()}") from None
        said = log.read_text()
        if not quiet:
            print(f"{name}: {' '.join(command)}\n{time.monotonic() - started:.1f} s, exit code {code}\n{said}")
        return subprocess.CompletedProcess(list(command), code, said, "")

    def processes(self, name: str, *words: str) -> list[int]:
        """Process ids, as this machine counts, of what runs on a host with all the words in its command line."""
        if name not in self._hosts:
            return []
        space = os.readlink(f"/proc/{self._first(name)}/ns/pid")
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _is_in(pid, space, words)]

    def on(self, name: str, command: Sequence[str], folder: Path | None = None) -> list[str]:
        """The command line that runs a command on a host, as `start` and `run` do."""
        spaces = ["--mount", "--uts", "--net", "--pid"]
        return ["nsenter", f"--target={self._first(name)}", *spaces, f"--wd={folder or self.folder}", *command]

    def _in_fabric(self, *command: str) -> None:
        assert self._fabric is not None
        inside = ["nsenter", f"--target={self._fabric.pid}", "--net", *command]
        subprocess.run(inside, check=True, env=environment_of_hosts(), timeout=30)

    def _first(self, name: str) -> int:
        """Process 1 of a host, as this machine counts."""
        first = self._first_of(self._hosts[name])
        assert first is not None, f"{name} is not up"
        return first

    @staticmethod
    def _first_of(host: subprocess.Popen[str]) -> int | None:
        """The one child of `unshare --fork`."""
        try:
            children = Path(f"/proc/{host.pid}/task/{host.pid}/children").read_text().split()
        except OSError:
            return None
        return int(children[0]) if children else None

    def _spawn(self, command: Sequence[str]) -> subprocess.Popen[str]:
        """A process that ends when this one does."""
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment_of_hosts(),
            start_new_session=True,
        )

    @staticmethod
    def _expect(host: subprocess.Popen[str], word: str) -> None:
        assert host.stdout is not None
        line = host.stdout.readline().strip()
        assert line == word, f"a simulated host did not come up: {line!r} in place of {word!r}"

    def _write_files(self) -> None:
        for name in ("key", "host_key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)],
                check=True,
                env=environment_of_hosts(),
                timeout=60,
            )
        self.folder.chmod(0o755)
        (self.folder / "sshd_config").write_text(SSHD.format(rig=self.folder))
        (self.folder / "ssh_config").write_text(SSH.format(rig=self.folder))
        addresses = [f"{NETWORK}.{number} {name}" for number, name in enumerate(self.names, 1)]
        names = "\n".join(["127.0.0.1 localhost", *addresses, ""])
        (self.folder / "known_hosts_of_the_network").write_text(names)


def environment_of_hosts(**changes: str) -> dict[str, str]:
    """The variables of a command on a host: none of this process's but where Python, this clone and its caches are."""
    return {
        "HOME": os.environ.get("HOME", "/root"),
        "USER": "root",
        "PATH": f"{Path(sys.executable).parent}:{SYSTEM_PATH}",
        "PYTHONPATH": str(ROOT),
        "TORCH_EXTENSIONS_DIR": os.environ["TORCH_EXTENSIONS_DIR"],
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **changes,
    }


def _is_in(pid: int, space: str, words: Sequence[str]) -> bool:
    try:
        if os.readlink(f"/proc/{pid}/ns/pid") != space:
            return False
        line = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:  # it has just ended
        return False
    return bool(line) and all(word in line for word in words)
