"""Who may write a training's files: one training at a time, on whatever machine.

The file ``.{output_name}.owner`` beside the LoRA names the process that trains (owner.py). It is made before states are
read, renewed every few seconds and removed when the training ends. Who finds another's waits for an owner that is about
to end, and takes over from one that is gone: its process or job is, or it renews nothing any more. Times are never
compared between machines; who waits watches for the change. An owner that was taken for gone writes nothing more.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qwen_image.files import temporary_name
from qwen_image.problems import InputError, Problem
from qwen_image.training.interruption import GOES_ON
from qwen_image.training.owner import is_here, is_running, read_owner, this_process
from qwen_image.training.together import first_decides

if TYPE_CHECKING:
    from accelerate import Accelerator

    from qwen_image.training.arguments import Settings

log = logging.getLogger(__name__)
RENEW_SECONDS = 10.0
TRUSTED_SECONDS = 5.0
"""How long the file need not be read again before something is written; much less than any of the two below."""
SILENT_SECONDS = 60.0
"""An owner of which nothing else is known is gone when it has renewed nothing for so long."""
SILENT_JOB_SECONDS = 20.0
"""The same where SLURM says that its job is over: a machine that SLURM lost may still run it."""
PATIENCE_SECONDS = 150.0
"""How long to wait for an owner that ends or is gone; more than a silence may last, or a job that SLURM ends."""
LONGEST = 65536
"""Bytes of the file that are read, were it another file altogether."""
LOOK_SECONDS = 1.0
ASK_SECONDS = 10.0
"""How often SLURM is asked about a job."""


class Ownership:
    """The right to write a training's files, held until `release`."""

    def __init__(self, path: Path, content: bytes) -> None:
        self._path = path
        self._content = content
        self._seen = _now()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="ownership", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise InputError when another training took over; nothing may be written then. Takes next to no time."""
        if _now() - self._seen > TRUSTED_SECONDS and not self._renew():
            self._fail()

    def release(self) -> None:
        """Let the next one have it."""
        self._released.set()
        self._thread.join()
        # the training is done whatever becomes of the file: an owner that is gone is found out
        with contextlib.suppress(OSError):
            if self._renew():
                self._path.unlink(missing_ok=True)

    def _keep_renewing(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            # a file system that does not answer now may do so next time; the training itself finds out what is wrong
            with contextlib.suppress(OSError):
                self._renew()

    def _renew(self) -> bool:
        """Show that the owner is at work; return whether it still is the owner."""
        # one that was about to take over from somebody else puts back at once what it took by mistake
        for pause in (0.0, 0.1, 1.0):
            time.sleep(pause)
            with contextlib.suppress(FileNotFoundError), open(self._path, "rb") as stream:
                if stream.read() != self._content:
                    return False
                os.utime(stream.fileno())
                self._seen = _now()
                return True
        return False

    def _fail(self) -> NoReturn:
        found = _look(self._path)
        other = found and read_owner(found.content)
        now = f"now {other} does" if other else "its file is gone"
        raise InputError([
            Problem(
                file=str(self._path), key="output_name",
                found=f"this training does not own its output any more ({now}); it writes nothing more",
                mend="once no other one writes it, run it again: it goes on from the newest state",
            )
        ])  # fmt: skip


class NoOwnership:
    """What every process of a training has but its first one, which alone writes files."""

    def check(self) -> None:
        """Do nothing."""

    def release(self) -> None:
        """Do nothing."""


@contextlib.contextmanager
def owned(
    settings: Settings, accelerator: Accelerator, stop: Callable[[], str | None]
) -> Iterator[Ownership | NoOwnership | None]:
    """Own the training's output, in its first process; None when `stop` gave a reason while another one was waited for.

    Raises InputError, in every process, when another training keeps it.
    """
    ownership: Ownership | NoOwnership | None = NoOwnership()

    def decide() -> bool:
        nonlocal ownership
        ownership = take(owner_path(settings), stop)
        return ownership is not None

    try:
        yield ownership if first_decides(accelerator, decide) else None
    finally:
        if ownership is not None:
            ownership.release()


def owner_path(settings: Settings) -> Path:
    """Return the file that names the owner of a training's output."""
    return Path(settings.output_dir) / f".{settings.output_name}.owner"


def take(path: Path, stop: Callable[[], str | None]) -> Ownership | None:
    """Return the ownership that a file stands for, once nobody else has it; None when `stop` gives a reason before.

    Raises InputError when another one keeps it, or when the file cannot be made.
    """
    content = this_process().text().encode()
    watch = _Watch()
    start, waiting = time.monotonic(), False
    while True:
        try:
            if _make(path, content):
                return Ownership(path, content)
            found = _look(path)
        except OSError as error:
            mend = "the training needs it to write there alone; see to the folder, or choose another output_dir"
            raise InputError(
                [Problem(file=str(path), found=f"cannot be made ({error.strerror})", mend=mend)]
            ) from error
        if found is not None and watch.is_gone(found):
            _break(path, found)
            continue
        if found is not None and not waiting:
            waiting = True
            log.warning("train: %s writes this output; waiting for it to end", _name(found))
        if why := stop():
            log.info("train: stopped while it waited for another training: %s; %s", why, GOES_ON)
            return None
        if time.monotonic() - start > PATIENCE_SECONDS:
            raise InputError([_kept(path, found)])
        time.sleep(LOOK_SECONDS)


@dataclass(frozen=True)
class _Found:
    """The file as it is at one moment."""

    content: bytes
    renewed: int
    """By the file system's clock, in nanoseconds; good for nothing but to be compared with itself."""


class _Watch:
    """Watches another training's file, and says when its owner is gone."""

    def __init__(self) -> None:
        self._found: _Found | None = None
        self._looked = _now()
        self._silent = 0.0
        self._asked = -math.inf
        self._running: bool | None = None

    def is_gone(self, found: _Found) -> bool:
        """Whether nobody is left who would renew the file. To be called about every LOOK_SECONDS."""
        now = _now()
        # time in which nobody looked, such as while the file system or this process stood still, is no silence
        self._silent = self._silent + min(now - self._looked, 2 * LOOK_SECONDS) if found == self._found else 0.0
        self._found, self._looked = found, now
        owner = read_owner(found.content)
        here = owner is not None and is_here(owner)
        if owner is not None and (here or now - self._asked >= ASK_SECONDS):
            self._running, self._asked = is_running(owner), now
        if self._running is None:
            return self._silent >= SILENT_SECONDS
        return not self._running and (here or self._silent >= SILENT_JOB_SECONDS)


def _make(path: Path, content: bytes) -> bool:
    """Make the file, unless it is there: of several that try, on any machines, one succeeds."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return True


def _look(path: Path) -> _Found | None:
    """Return what the file holds and when it was renewed, or None where there is none."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as stream:
        # opened first: a network file system may answer with what it remembers otherwise
        return _Found(stream.read(LONGEST), os.fstat(stream.fileno()).st_mtime_ns)
    return None


def _break(path: Path, stale: _Found) -> None:
    """Remove the file of an owner that is gone, and no other: somebody else may do the same at this moment."""
    if _look(path) != stale:
        return
    # under a name that is cleared away if this process is killed here
    aside = path.with_name(temporary_name())
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if _look(aside) == stale:
            log.warning("train: %s is gone and has left its output to this training", _name(stale))
        else:
            # a newer owner's; should yet another one have made the file now, the newer one finds out and stops
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink()


def _kept(path: Path, found: _Found | None) -> Problem:
    owner = found and read_owner(found.content)
    look = f"look with {owner.how_to_look}, " if owner else ""
    return Problem(
        file=str(path),
        key="output_name",
        found=f"{_name(found)} writes the same output, and has not ended within {PATIENCE_SECONDS:.0f} s",
        mend=f"{look}wait for it or stop it, or choose another output_name; if it certainly does not run any more, "
        f"remove this file: rm {shlex.quote(str(path))}",
    )


def _name(found: _Found | None) -> str:
    owner = found and read_owner(found.content)
    return str(owner) if owner else "another training"


def _now() -> float:
    """Seconds since some moment, those included in which this process or its machine stood still."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
