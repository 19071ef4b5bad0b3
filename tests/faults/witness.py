"""Runs first in every program of a workflow, counts what the program does with the project's files, and does a deed.

The variable WITNESS holds a JSON object: "counts", a folder for the counts of all programs; or "program", "at" and
"deed", a deed that is done once, just before that program's operation number `at` (of those that read files, for a read
error), and "done", a file that tells of it.
"""

import atexit
import errno
import fcntl
import json
import os
import random
import resource
import signal
import sys
from pathlib import Path

FILLER = "filler"
READ_ERROR = "read error"
OPERATIONS = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.utime",
}


class Witness:
    """One program's."""

    def __init__(self, orders: dict) -> None:
        self.orders = orders
        self.project = os.path.join(os.getcwd(), "")
        self.program = Path(sys.argv[0]).name
        self.count = self.reads = 0
        self.busy = False
        self.process = os.getpid()
        if self.program.endswith(".py") and ("counts" in orders or orders["program"] == self.program):
            if "counts" in orders:
                atexit.register(self.write)
            sys.addaudithook(self.see)

    def see(self, event: str, words: tuple) -> None:
        """Count an operation on a file of the project; at the one that was ordered, do the deed first."""
        if event not in OPERATIONS or self.busy or os.getpid() != self.process or not self.concerns(words[0]):
            return
        self.count += 1
        reads = event == "open" and is_read(words)
        self.reads += reads
        orders = self.orders
        if "counts" in orders:
            return
        of_reads = orders["deed"] == READ_ERROR
        if (of_reads and not reads) or (self.reads if of_reads else self.count) < orders["at"]:
            return
        self.busy = True
        try:
            self.do(orders["deed"], words)
        finally:
            self.busy = False

    def concerns(self, path: object) -> bool:
        """Whether it lies in the project, and is no log or note of Snakemake's."""
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        whole = os.path.join(self.project, os.fsdecode(path))
        inner = whole.removeprefix(self.project)
        return inner != whole and inner.startswith(("results/", "resources/"))

    def do(self, deed: str, words: tuple) -> None:
        """Do it, once in the whole workflow; a deed that cannot be done yet is tried again at the next operation."""
        project, choice = Path(self.project), random.Random(self.orders["seed"])
        paths = sorted(victims(project, deed, choice))
        if not paths and deed in NEED_VICTIM:
            return
        try:
            told = os.open(self.orders["done"], os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return
        victim = choice.choice(paths) if paths else None
        os.write(told, str(victim.relative_to(project) if victim else "").encode())
        os.close(told)
        if deed in KILLS:
            number, whom = KILLS[deed]
            snakemake = int((project / "snakemake.pid").read_text())
            {"stage": os.kill, "Snakemake": os.kill, "group": os.killpg}[whom](
                os.getpid() if whom == "stage" else snakemake, number
            )
        elif deed == "disk full":
            fill(project / FILLER)
        elif deed == "file size limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        elif deed == READ_ERROR:
            raise OSError(errno.EIO, os.strerror(errno.EIO), os.fsdecode(words[0]))
        elif deed == "clock set back":
            set_clock_back(project, choice)
        elif victim is not None:
            damage(victim, deed, choice)

    def write(self) -> None:
        """Add this program's counts to the table of counts."""
        self.busy = True
        with open(Path(self.orders["counts"], self.program), "a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.write(json.dumps({"operations": self.count, "reads": self.reads}) + "\n")


KILLS = {
    "kill -9 of the stage": (signal.SIGKILL, "stage"),
    "kill -9 of the process group": (signal.SIGKILL, "group"),
    "kill -9 of Snakemake": (signal.SIGKILL, "Snakemake"),
    "SIGTERM to the stage": (signal.SIGTERM, "stage"),
    "SIGTERM to the process group": (signal.SIGTERM, "group"),
    "SIGTERM to Snakemake": (signal.SIGTERM, "Snakemake"),
}
CACHE_FILES = ["cache file truncated", "cache file bit-flipped", "cache file deleted", "cache file became a directory"]
MANIFESTS = ["manifest deleted", "manifest edited"]
NEED_VICTIM = {*CACHE_FILES, *MANIFESTS}


def victims(project: Path, deed: str, choice: random.Random) -> list[Path]:
    """The files that a deed may be done to."""
    if deed in CACHE_FILES:
        return [path for path in (project / "results/cache").rglob("*.safetensors") if not path.name.startswith(".")]
    if deed in MANIFESTS:
        return [path for path in (project / "results/manifests").rglob("*.tsv") if "rejects" not in path.name]
    return []


def is_read(words: tuple) -> bool:
    """Whether the words of an open are those of reading a file that something is made from."""
    path, _, flags = words
    name = Path(os.fsdecode(path)).name
    return not flags & (os.O_WRONLY | os.O_RDWR) and Path(os.fsdecode(path)).is_file() and not name.startswith(".")


def damage(path: Path, deed: str, choice: random.Random) -> None:
    """Do to a file what the deed says."""
    content = path.read_bytes()
    path.unlink()
    if deed == "cache file truncated":
        path.write_bytes(content[: choice.randrange(len(content))])
    elif deed == "cache file bit-flipped":
        position, bit = choice.randrange(len(content)), 1 << choice.randrange(8)
        path.write_bytes(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
    elif deed == "cache file became a directory":
        path.mkdir()
    elif deed == "manifest edited":
        lines = content.decode().splitlines(keepends=True)
        number = choice.randrange(1, len(lines))
        # one row less, or another size, bucket or fingerprint
        edited = "" if choice.random() < 0.5 else lines[number].translate(str.maketrans("2a", "3b"))
        path.write_text("".join([*lines[:number], edited, *lines[number + 1 :]]))


def set_clock_back(project: Path, choice: random.Random) -> None:
    """Give some of the files a time long ago, and some one that is still to come."""
    for folder in ("results", "resources"):
        for path in sorted((project / folder).rglob("*")):
            if path.is_file() and choice.random() < 0.5:
                # 2001 and 2040
                time = choice.choice([1_000_000_000, 2_224_000_000])
                os.utime(path, (time, time))


def fill(path: Path) -> None:
    """Take all the space that the file system has."""
    with open(path, "ab", buffering=0) as stream:
        try:
            while stream.write(b"\0" * 65536):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC


if os.environ.get("WITNESS"):
    Witness(json.loads(os.environ["WITNESS"]))
