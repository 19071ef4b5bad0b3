"""GPUs lent to one stage at a time, among all stages of this user on this machine, whatever workflow they belong to.

A lease is a locked file in a folder of the user's own that names its devices. The lock belongs to the open file, which
the stage's program and all that it starts inherit as their standard input: it ends with the last of them, however that
ends, and with nobody before.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwen_image.devices import VISIBLE, Device, candidates
from qwen_image.files import lock
from qwen_image.problems import InputError, Problem

POLL_SECONDS = 1.0
"""Nothing tells that a lock has ended but trying it; a GPU that waits a second longer is no loss."""


@dataclass(frozen=True)
class Lease:
    """The devices that a program may use until the lease ends."""

    devices: tuple[Device, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    """What the program's environment needs besides, so that it sees them and no others."""
    descriptor: int | None = None
    """The locked file, for the program to inherit; None where nothing is locked."""


@contextlib.contextmanager
def lease_devices(count: int, gpu_ids: str, holder: str, say: Callable[[str], None]) -> Iterator[Lease]:
    """Lend so many devices until the end of the block, and wait while fewer are free.

    `gpu_ids` limits them as for `devices.candidates`. `holder` is shown to others that wait for the same devices, `say`
    tells that this one waits. Where no device is known, or all that SLURM gave the job are wanted, nothing is locked.
    Raises InputError for devices that are not there, for more than there are, and where no lock can be had.
    """
    devices = candidates(gpu_ids) if count else []
    job = os.environ.get("SLURM_JOB_ID")
    if devices and count > len(devices):
        found = f"{count} are wanted, and there are {len(devices)}: {_names(devices)}"
        mend = "lower num_processes, or " + ("ask SLURM for more" if job else "name more devices in gpu_ids")
        raise InputError([Problem(file=f"GPUs of {'job ' + job if job else 'this machine'}", found=found, mend=mend)])
    if not devices or (job and count == len(devices)):
        yield Lease(tuple(devices))
        return
    descriptor = None
    try:
        chosen, descriptor = _wait_for(devices, count, holder, say)
        # one that is named by its place among the visible ones keeps it
        as_named = gpu_ids.startswith("cuda:")
        environment = {} if as_named else {VISIBLE: ",".join(device.word for device in chosen)}
        yield Lease(tuple(chosen), environment, descriptor)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _wait_for(
    devices: Sequence[Device], count: int, holder: str, say: Callable[[str], None]
) -> tuple[list[Device], int | None]:
    """Return devices that were free, and the open file whose lock holds them, or None where there are no locks."""
    folder = private_folder()
    if folder is None:
        where = "~/.cache, XDG_RUNTIME_DIR and .snakemake"
        if count < len(devices):
            found = f"any of {_names(devices)} may be in use: none of {where} is a folder of this user's own with locks"
            mend = "set XDG_RUNTIME_DIR to one on a local disk, or name in gpu_ids those that nothing else uses"
            raise InputError([Problem(file="GPUs of this machine", found=found, mend=mend)])
        say(f"GPUs are not reserved: none of {where} is a folder of this user's own with locks")
        return list(devices), None
    told = False
    while True:
        with lock(folder / "lock"):
            taken = _taken(folder)
            free = [device for device in devices if device.identity not in taken]
            # all at once: nobody waits for more while holding some, so no two can wait for each other
            if len(free) >= count:
                return free[:count], _record(folder, free[:count], holder)
        if not told:
            users = {taken[device.identity] for device in devices if device.identity in taken}
            say(f"waiting for {count} of the GPUs {_names(devices)}, in use by {', '.join(sorted(users))}")
            told = True
        time.sleep(POLL_SECONDS)


def _taken(folder: Path) -> dict[str, str]:
    """Return who holds which device; leases that have ended are removed."""
    taken = {}
    for path in folder.glob("*.lease"):
        with open(path, "r+b") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held = json.load(stream)
                taken |= dict.fromkeys(held["devices"], held["holder"])
            else:
                path.unlink()
    return taken


def _record(folder: Path, devices: Sequence[Device], holder: str) -> int:
    descriptor, _ = tempfile.mkstemp(suffix=".lease", dir=folder)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, json.dumps({"devices": [device.identity for device in devices], "holder": holder}).encode())
    # where the home is shared, for other machines to read it whole
    os.fsync(descriptor)
    return descriptor


def private_folder() -> Path | None:
    """Return a folder that this user alone can read and where files can be locked, or None.

    First below the home, which is the same however the user came in; XDG_RUNTIME_DIR is there only for some logins.
    Snakemake's own folder is at least the same for all stages of this workflow.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    workflow = os.path.abspath(".snakemake")
    for base in (cache, os.environ.get("XDG_RUNTIME_DIR"), workflow if os.path.isdir(workflow) else None):
        if base and os.path.isabs(base):
            folder = Path(base) / "qwen_image" / "gpus"
            with contextlib.suppress(OSError):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                # fails where the folder is another user's
                folder.chmod(0o700)
                # for reading too: on NFS a shared lock needs that
                with open(folder / "lock", "a+b") as stream:
                    fcntl.flock(stream, fcntl.LOCK_SH)
                return folder
    return None


def _names(devices: Sequence[Device]) -> str:
    return ",".join(device.name for device in devices)
