"""A throwaway SLURM cluster on loopback: one controller, two nodes, its own MUNGE key, one temporary folder.

A command (by default a shell) in such a cluster, which is gone when the command ends:

    python tests/cluster/slurm.py sinfo

It needs Debian's slurm-wlm and munge (.ci/install_slurm.sh), no systemd, no cgroups and no root; a cluster that the
machine already belongs to is neither read nor touched.
"""

import contextlib
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "salloc", "squeue", "scancel", "scontrol", "sinfo", "sacct", "sacctmgr", "sshare")

# Declared, not measured (config_overrides): two jobs of two threads run at once on a machine of any size. SLURM only
# counts CPUs and memory here, it holds no job to them.
NODES = ("n1", "n2")
CPUS_PER_NODE = 2
MEMORY_MB_PER_NODE = 16000
GPUS_PER_NODE = 2

START_TIMEOUT_SECONDS = 60
STOP_TIMEOUT_SECONDS = 20

SLURM_CONF = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# The second also says how long a job waits that SLURM puts back into the queue; the default is two minutes.
AuthInfo=socket={root}/munge.socket,cred_expire=20
StateSaveLocation={root}/state
SlurmdTimeout={node_timeout}
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/{tracking}
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# A job that does not say how much memory it needs would get all of its node's.
DefMemPerCPU=500
# Without it a submitted job may wait 3 s for others to be scheduled with.
SchedulerParameters=batch_sched_delay=0
GresTypes=gpu
# Accounting is off by default, so sacct has nothing to say. squeue remembers ended jobs for MinJobAge seconds.
MinJobAge=3600
ReturnToService=2
{node_lines}
{more}
PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE State=UP
"""


class ClusterError(RuntimeError):
    """The cluster did not come up; the message carries the end of every daemon's log."""


@dataclass
class Cluster:
    """A running cluster: where it lives and the environment in which SLURM's commands talk to it and to no other."""

    root: Path
    env: dict[str, str]
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    def run(self, *command: str | Path, timeout: float = 120, **options) -> subprocess.CompletedProcess:
        """Run a command against this cluster and capture its output as text; its exit status is not checked."""
        options = {"env": self.env, "capture_output": True, "text": True, "timeout": timeout, **options}
        return subprocess.run([str(part) for part in command], **options)

    def start(self, daemon: str, *command: str | Path) -> None:
        """Start a daemon in the foreground of a session of its own, so that Ctrl-C does not end it before its jobs."""
        with open(self.root / f"{daemon}.out", "ab") as output:
            self.daemons[daemon] = subprocess.Popen(
                [str(part) for part in command],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def start_controller(self) -> None:
        """Start slurmctld; one that died goes on from the state that it saved."""
        self.start("slurmctld", _program("slurmctld"), "-D", "-f", self.root / "slurm.conf")

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self.start(f"slurmd-{node}", _program("slurmd"), "-D", "-N", node, "-f", self.root / "slurm.conf")

    def members(self) -> list[int]:
        """Return the ids of this cluster's processes: daemons, job steps and jobs alike."""
        return _members(self.root)

    def node_states(self) -> dict[str, str]:
        """Return SLURM's state of each node, such as {"n1": "idle"}; empty while the controller does not answer."""
        listing = self.run("sinfo", "--noheader", "--Node", "--format=%N %T")
        return dict(line.split() for line in listing.stdout.splitlines())

    def facts(self, job: str) -> dict[str, str]:
        """Return what SLURM knows about a job, by its words: NodeList, StartTime, JobState and so on."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", job).stdout))

    def logs(self, lines: int = 20) -> str:
        """Return the last lines of every daemon's log and output."""
        # A daemon that got as far as its log file repeats the log on its output.
        files = [log if (log := output.with_suffix(".log")).exists() else output for output in self.root.glob("*.out")]
        tails = {file.name: file.read_text(errors="replace").splitlines()[-lines:] for file in sorted(files)}
        return "\n".join(f"--- {name}\n" + "\n".join(tail) for name, tail in tails.items() if tail)


def missing_programs() -> list[str]:
    """Return the SLURM and MUNGE programs that this machine lacks; empty when a cluster can be started."""
    return [name for name in DAEMONS + COMMANDS if shutil.which(name, path=_search_path()) is None]


@contextlib.contextmanager
def throwaway_cluster(node_timeout: int = 300, tracking: str = "linuxproc", more: str = "") -> Iterator[Cluster]:
    """Start a cluster, yield it when both nodes are idle, and leave no process and no file behind, whatever happens.

    A node that does not answer for `node_timeout` seconds counts as failed. By `tracking` SLURM finds the processes of
    a step; with "pgid" it kills what its first process leaves behind, as it does on sites (which have "cgroup", and
    that needs systemd). `more` goes into slurm.conf before the partition.
    Raises ClusterError when a daemon ends or the nodes are not idle after START_TIMEOUT_SECONDS.
    """
    # Not pytest's tmp_path: a Unix socket's path may have 107 characters, and munged wants every user to reach it.
    root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    root.chmod(0o755)
    cluster = Cluster(root, _environment(root))
    with _guard(cluster):
        _write_configuration(root, node_timeout=node_timeout, tracking=tracking, more=more)
        _write_commands(root)
        _start_munge(cluster)
        cluster.start_controller()
        for node in NODES:
            cluster.start_node(node)
        _wait(cluster, "both nodes idle", lambda: cluster.node_states() == dict.fromkeys(NODES, "idle"))
        yield cluster


@contextlib.contextmanager
def _guard(cluster: Cluster) -> Iterator[None]:
    """Clean up at the end of the block, or of this process: a guard process waits for the end of its own input.

    A finally block is not enough: a CI system that runs out of time kills pytest, and daemons outlive it.
    """
    command = [sys.executable, __file__, "--guard", str(cluster.root)]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        guard.communicate()
        for daemon in cluster.daemons.values():
            daemon.kill()
            daemon.wait()


def _keep_guard(root: Path) -> None:
    """Wait for the end of the input, end every process of the cluster at `root` and remove the folder."""
    sys.stdin.read()
    deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
    # TERM first: the daemons end in order. A second round with KILL is for slurmstepd, which outlives its slurmd.
    sent = signal.SIGTERM
    while (members := _members(root)) and time.monotonic() < deadline:
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sent)
        give_time = time.monotonic() + 3
        while _members(root) and time.monotonic() < give_time:
            time.sleep(0.1)
        sent = signal.SIGKILL
    shutil.rmtree(root, ignore_errors=True)


def _members(root: Path) -> list[int]:
    """Return the ids of the processes of the cluster at `root`: daemons, job steps and jobs alike.

    All of them, and nothing else, were started with this SLURM_CONF; the folder's name is unique.
    """
    mark = f"SLURM_CONF={root}/slurm.conf".encode()
    members = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        # Others' processes cannot be read, and any process may end meanwhile.
        with contextlib.suppress(OSError):
            if mark in environ.read_bytes().split(b"\0"):
                members.append(int(environ.parent.name))
    return members


def _environment(root: Path) -> dict[str, str]:
    """Return this process's environment with its own cluster in place of any other that SLURM variables point at."""
    foreign = re.compile("SLURM|SBATCH|SALLOC|SQUEUE|SINFO|SCANCEL|SACCT|MUNGE|SNAKEMAKE")
    env = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    return env | {"SLURM_CONF": f"{root}/slurm.conf", "PATH": f"{root}/bin:{_search_path()}"}


def _search_path() -> str:
    # Jobs call `python` and `accelerate` by name, so this interpreter's come first; the daemons' folder is not on an
    # ordinary user's PATH.
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])


def _program(name: str) -> str:
    path = shutil.which(name, path=_search_path())
    assert path is not None, f"{name}: check missing_programs() first"
    return path


def _write_configuration(root: Path, **settings: object) -> None:
    controller_port, *node_ports = _free_ports(1 + len(NODES))
    node_lines = [
        f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} "
        f"CPUs={CPUS_PER_NODE} RealMemory={MEMORY_MB_PER_NODE} Gres=gpu:{GPUS_PER_NODE} State=UNKNOWN"
        for node, port in zip(NODES, node_ports, strict=True)
    ]
    conf = SLURM_CONF.format(
        host=socket.gethostname().split(".")[0],
        user=pwd.getpwuid(os.getuid()).pw_name,
        root=root,
        controller_port=controller_port,
        node_lines="\n".join(node_lines),
        nodes=",".join(NODES),
        **settings,
    )
    (root / "slurm.conf").write_text(conf)
    # The links stand in for /dev/nvidia0 and so on: SLURM wants a device, and takes the number that it puts into
    # CUDA_VISIBLE_DEVICES from the file's name.
    for gpu in range(GPUS_PER_NODE):
        (root / f"gpu{gpu}").symlink_to(os.devnull)
    (root / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={root}/gpu[0-{GPUS_PER_NODE - 1}]\n")
    (root / "state").mkdir()
    for node in NODES:
        (root / f"spool-{node}").mkdir()


def _write_commands(root: Path) -> None:
    """Write each SLURM command as a script that sets SLURM_CONF: Snakemake's plugin drops it before it calls srun."""
    (root / "bin").mkdir()
    for name in COMMANDS:
        script = root / "bin" / name
        script.write_text(f'#!/bin/sh\nexport SLURM_CONF={root}/slurm.conf\nexec {_program(name)} "$@"\n')
        script.chmod(0o755)


def _start_munge(cluster: Cluster) -> None:
    """Start munged with a fresh key and wait until it signs."""
    root = cluster.root
    key, unix_socket = root / "munge.key", root / "munge.socket"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    files = {"key-file": key, "socket": unix_socket, "pid-file": root / "munged.pid", "seed-file": root / "munged.seed"}
    options = [f"--{name}={file}" for name, file in files.items()]
    cluster.start("munged", _program("munged"), "--foreground", *options)
    _wait(cluster, "MUNGE's socket", unix_socket.exists)


def _wait(cluster: Cluster, what: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while not ready():
        ended = [name for name, daemon in cluster.daemons.items() if daemon.poll() is not None]
        if ended or time.monotonic() > deadline:
            why = f"{', '.join(ended)} ended" if ended else f"waited {START_TIMEOUT_SECONDS} s"
            raise ClusterError(f"No throwaway cluster: {what}: {why}.\n{cluster.logs()}")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    """Return free TCP ports below Linux's range for outgoing connections, where another program could take them."""
    ports = []
    for port in random.sample(range(20000, 32000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise ClusterError("No throwaway cluster: no free ports between 20000 and 32000.")


def main(argv: list[str] | None = None) -> int:
    """Run a command in a throwaway cluster and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--guard"]:
        _keep_guard(Path(argv[1]))
        return 0
    if missing := missing_programs():
        print(f"Not installed: {', '.join(missing)}. On Debian: bash .ci/install_slurm.sh", file=sys.stderr)
        return 2
    with throwaway_cluster() as cluster:
        return subprocess.run(argv or ["bash"], env=cluster.env).returncode


if __name__ == "__main__":
    sys.exit(main())
