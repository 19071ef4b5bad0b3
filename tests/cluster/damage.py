"""What goes wrong on a cluster: nodes that die with all that runs on them, a controller that is killed."""

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.driving import PICTURES, Run
from cluster.slurm import Cluster


def kill_node(cluster: Cluster, node: str) -> None:
    """Kill a node as a power cut does: its slurmd, its job steps and every process of its jobs, at once.

    SLURM notices when the node has not answered for as long as the cluster's node_timeout, or when it starts again.
    """
    jobs = cluster.run("squeue", "--noheader", f"--nodelist={node}", "--format=%A").stdout.split()
    _kill_daemon(cluster, f"slurmd-{node}")
    for pid in cluster.members():
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
            step = re.match(r"slurmstepd: \[(\d+)\.", command)
            if (step and step[1] in jobs) or f"SLURMD_NODENAME={node}" in _environment(pid):
                os.kill(pid, signal.SIGKILL)


def kill_controller(cluster: Cluster, *, remembers: bool = True) -> None:
    """Kill slurmctld: no command of SLURM is answered until it is started again, and the jobs run on.

    It saves its jobs every five seconds. Until it has, or with remembers=False, it does not know them afterwards.
    """
    saved = cluster.root / "state" / "job_state"
    if remembers:
        before = saved.stat().st_mtime_ns
        for job in cluster.run("squeue", "--noheader", "--format=%A").stdout.split():
            # to what it is: any update is a reason to save
            cluster.run("scontrol", "update", f"JobId={job}", "Nice=0")
        deadline = time.monotonic() + 30
        while saved.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline, cluster.logs()
            time.sleep(0.1)
    _kill_daemon(cluster, "slurmctld")
    if not remembers:
        for file in saved.parent.glob("job_state*"):
            file.unlink()


def replace_sacct(cluster: Cluster) -> tuple[Path, Path]:
    """Put a sacct into the cluster, which has no accounting, that answers Snakemake's plugin from squeue's memory.

    Returns two paths: it adds a letter to the first whenever it is asked, and fails while the second exists.
    """
    asked, out_of_order = cluster.root / "sacct-asked", cluster.root / "sacct-out-of-order"
    (cluster.root / "bin" / "sacct").write_text(
        f"#!/bin/sh\nprintf x >> {asked}\n"
        f"[ ! -e {out_of_order} ] || {{ echo 'sacct: error: Connection refused' >&2; exit 1; }}\n"
        'for name in "$@"; do :; done\n'
        "exec squeue --states=all --noheader '--format=%i|%T' --name \"$name\"\n"
    )
    return asked, out_of_order


def path_without(cluster: Cluster, program: str, folder: Path) -> str:
    """Return a PATH like the cluster's on which one program is not; `folder` is filled with links to the others."""
    folder.mkdir(parents=True)
    first, *others = cluster.env["PATH"].split(os.pathsep)
    python = str(Path(sys.executable).parent)
    for place in (first, *others):
        for file in Path(place).iterdir() if place != python and Path(place).is_dir() else ():
            link = folder / file.name
            if file.name != program and not link.is_symlink():
                link.symlink_to(file)
    return os.pathsep.join([python, str(folder)])


def stage_processes(cluster: Cluster, folder: Path, program: str) -> list[int]:
    """Return the ids of the processes of this cluster that run a program of scripts/ for the project in `folder`."""
    found = []
    for pid in cluster.members():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
            if Path(f"/proc/{pid}/cwd").resolve() == folder and any(Path(word).name == program for word in words[:2]):
                found.append(pid)
    return found


@contextlib.contextmanager
def it_caches(run: Run) -> Iterator[None]:
    """Wait until the first of the missing latents are cached, and hold the caching for the length of the block."""
    before = run.project.latents()
    run.until(lambda: before < run.project.latents() < PICTURES)
    with frozen(stage_processes(run.project.cluster, run.project.folder, "qwen_image_cache_latents.py")):
        yield


@contextlib.contextmanager
def it_trains(run: Run, steps: int = 2) -> Iterator[None]:
    """Wait until some steps are done, and hold the training for the length of the block."""
    run.until(lambda: run.project.steps() >= steps)
    with frozen(stage_processes(run.project.cluster, run.project.folder, "qwen_image_train_network.py")):
        yield


@contextlib.contextmanager
def frozen(pids: list[int]):
    """Stop the processes for the length of the block, so that what they do cannot end before it."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _kill_daemon(cluster: Cluster, name: str) -> None:
    daemon = cluster.daemons.pop(name)
    daemon.kill()
    daemon.wait()


def _environment(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
