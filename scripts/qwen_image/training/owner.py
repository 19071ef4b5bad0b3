"""Which process trains, so that others can look it up: on its own machine by its number, elsewhere by its SLURM job."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

SQUEUE_SECONDS = 20
"""A SLURM controller that has not answered by then is taken for one that is down."""
OVER = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
"""States in which squeue lists a job of which no process is left: it waits to be run once more."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process that trains."""

    token: str
    """Random, so that no two are ever equal."""
    host: str
    place: str
    """Where the numbers of processes mean the same: one start of a machine and, on Linux, one space of numbers."""
    pid: int
    started: float
    """When the process began, on its own machine's clock; another one of the same number began later."""
    user: int
    job: str | None
    cluster: str | None

    def __str__(self) -> str:
        """``SLURM job 12 (process 345 on node1)``."""
        process = f"process {self.pid} on {self.host}"
        return f"SLURM job {self.job} ({process})" if self.job else process

    @property
    def how_to_look(self) -> str:
        """What shows whether it still runs."""
        return f"`squeue --job {self.job}`" if self.job else f"`ps -p {self.pid}` on {self.host}"

    def text(self) -> str:
        """What `read_owner` reads."""
        return json.dumps(asdict(self)) + "\n"


def this_process() -> Owner:
    """Return this process as an owner, another one at each call."""
    return Owner(
        token=secrets.token_hex(16),
        host=socket.gethostname(),
        place=_place(),
        pid=os.getpid(),
        started=_start_of(os.getpid()) or 0.0,
        user=os.getuid(),
        job=os.environ.get("SLURM_JOB_ID"),
        cluster=os.environ.get("SLURM_CLUSTER_NAME"),
    )


def read_owner(content: bytes) -> Owner | None:
    """Return the owner that a file names, or None where it was not written whole or is of another version."""
    with suppress(ValueError, TypeError):
        owner = Owner(**json.loads(content))
        if isinstance(owner.pid, int) and all(isinstance(text, str | None) for text in (owner.job, owner.cluster)):
            return owner
    return None


def is_here(owner: Owner) -> bool:
    """Whether the owner's process can be looked up on this machine."""
    return owner.place == _place()


def is_running(owner: Owner) -> bool | None:
    """Whether the owner's process still runs or, elsewhere, its job; None where that cannot be told from here."""
    if not is_here(owner):
        return _is_job_there(owner)
    start = _start_of(owner.pid)
    return None if start is None and _is_hidden(owner.pid) else start == owner.started


def _place() -> str:
    if sys.platform != "linux":
        return socket.gethostname()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _start_of(pid: int) -> float | None:
    """Return when a process began, or None when there is none: on Linux in ticks that no setting of a clock moves."""
    if sys.platform != "linux":
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
        return None
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # the name before it stands in parentheses and may hold some itself
    state, *fields = text.rpartition(")")[2].split()
    # one that was killed stays as a zombie until its parent takes notice
    return None if state in "ZX" else float(fields[18])


def _is_hidden(pid: int) -> bool:
    """Whether the process is there but shown to its own user alone, as some machines have it."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        pass
    return False


def _is_job_there(owner: Owner) -> bool | None:
    """Whether SLURM still has the owner's job; None where there is none, or where its answer would not tell."""
    # the numbers of another cluster's jobs are others, and a job that is run again keeps its own
    if not owner.job or owner.cluster != os.environ.get("SLURM_CLUSTER_NAME"):
        return None
    if owner.job == os.environ.get("SLURM_JOB_ID"):
        return None
    command = ["squeue", "--noheader", f"--jobs={owner.job}", "--format=%T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return None
    if any(state not in OVER for state in answer.stdout.split()):
        return True
    # some clusters show nobody the jobs of others
    return False if owner.user == os.getuid() else None
