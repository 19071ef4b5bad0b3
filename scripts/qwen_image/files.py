"""Files on disk: writing them whole or not at all, and knowing their content's hash without reading them twice."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

RACY_NANOSECONDS = 2_000_000_000  # a file changed less than this ago may change again within one clock tick
DAY = 24 * 60 * 60  # seconds


def atomic_write(path: str | Path, content: bytes | str | Callable[[BinaryIO], None]) -> None:
    """Write a file under a temporary name in its own folder, flush it to disk, then rename it into place.

    Readers see the old file or the new one, never a part. The mode follows the umask, missing parent folders are
    made, and the temporary is removed when writing fails; one that a killed writer left there, too.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tidy(path.parent.absolute())
    temporary, descriptor = _open_temporary(path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            if callable(content):
                content(stream)
            else:
                stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Make a folder of a temporary name, and remove it in the end unless it got another one.

    Those that killed writers left there are removed, too.
    """
    remove_abandoned(parent, folders=True)
    while True:
        folder = parent / temporary_name()
        folder.mkdir()
        descriptor = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # before it was locked it may have passed for abandoned
        if folder.exists():
            break
        os.close(descriptor)
    try:
        yield folder
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
        os.close(descriptor)


def remove_abandoned(folder: str | Path, *, folders: bool = False) -> None:
    """Remove the temporaries in a folder whose writers were killed, files or folders; those of writers at work stay.

    Where the file system has no locks nobody can tell, and all stay. Another machine's lock may not be seen here, so
    its temporaries stay for a day.
    """
    remove = _remove_folder_if_abandoned if folders else _remove_if_abandoned
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            is_one = entry.is_dir(follow_symlinks=False) if folders else entry.is_file(follow_symlinks=False)
            if not re.fullmatch(r"\.tmp-[0-9a-f]{16}", entry.name) or not is_one:
                continue
            if entry.name.startswith(f".tmp-{_machine()}") or entry.stat().st_mtime < time.time() - DAY:
                remove(Path(entry.path))


@functools.cache
def tidy(folder: Path) -> None:
    """Remove what is abandoned in a folder of an absolute path, once a process: a cache may have very many files."""
    remove_abandoned(folder)


def write_if_changed(path: str | Path, content: str) -> bool:
    """Write a text file only when its content differs from what is there. Returns whether it was written."""
    path = Path(path)
    with contextlib.suppress(FileNotFoundError, IsADirectoryError):
        if path.read_bytes() == content.encode():
            tidy(path.parent.absolute())
            return False
    atomic_write(path, content)
    return True


def sha256_file(path: str | Path) -> str:
    """Return the hex SHA-256 of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_sha256(value: object) -> bool:
    """Whether a value is what `sha256_file` returns."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def sha256_files(
    paths: Iterable[str | Path], memo: FileMemo, sha256_of: Callable[[str | Path], str] = sha256_file
) -> str:
    """Return one hash for the content of several files. Names count only by their order, folders not at all."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(memo.value(path, lambda path: [sha256_of(path)])[0]))
    return digest.hexdigest()


def safe_name(text: str, longest: int = 64) -> str:
    """Return a name that is safe in any path: the text itself where it is, else a readable part of it and a hash."""
    if len(text) <= longest and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", text):
        return text
    readable = re.sub(r"[^A-Za-z0-9_]+", "_", text).strip("_")[: longest - 24]
    return f"{readable}-{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:10]}".lstrip("-")


class FileMemo:
    """What was once computed from a file's content, remembered by its path, size and times of change.

    Deleting the memo costs time and nothing else. Files that changed a moment ago are not remembered, because a
    second change could fall into the same clock tick. Several processes may share one memo.
    """

    def __init__(self, path: str | Path, is_valid: Callable[[list], bool]) -> None:
        """`is_valid` says whether remembered values are of the kind that `compute` gives; others are computed again."""
        self._path = Path(path)
        self._is_valid = is_valid
        self._rows = self._load()
        self._used: dict[str, list] = {}

    def value(self, path: str | Path, compute: Callable[[str | Path], list]) -> list:
        """Return what `compute` gives for this file (a list of JSON values), from memory where the file is unchanged.

        Raises whatever `compute` and ``os.stat`` raise.
        """
        before = os.stat(path)
        # the time of the last change to the file or its dates, which no program can set back, tells a restored mtime
        key, stamp = os.fspath(path), [before.st_size, before.st_mtime_ns, before.st_ctime_ns]
        row = self._rows.get(key)
        if not (isinstance(row, list) and row[:3] == stamp and self._is_valid(row[3:])):
            row = [*stamp, *compute(path)]
        if time.time_ns() - before.st_mtime_ns > RACY_NANOSECONDS:
            self._used[key] = row
        return row[3:]

    def save(self, *, keep_others: bool = False) -> None:
        """Store what this run used. A folder that cannot be written stays as it was.

        `keep_others` is for a memo that several runs share, each with files of its own.
        """
        if all(self._rows.get(key) == row for key, row in self._used.items()):
            return
        with contextlib.suppress(OSError), lock(self._path.with_name(f"{self._path.name}.lock")):
            others = self._load() if keep_others else {}
            atomic_write(self._path, json.dumps(others | self._used, ensure_ascii=True))

    def _load(self) -> dict[str, list]:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            rows = json.loads(self._path.read_text(encoding="utf-8"))
            return rows if isinstance(rows, dict) else {}
        return {}


@contextlib.contextmanager
def lock(path: str | Path) -> Iterator[None]:
    """Hold a lock file while others wait. Where the file system has no locks nobody waits."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as stream:
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def temporary_name() -> str:
    """Return a name that nobody can guess, of what `remove_abandoned` clears away once nobody holds it."""
    return f".tmp-{_machine()}{secrets.token_hex(6)}"


def _open_temporary(folder: Path) -> tuple[Path, int]:
    """Make a new file and hold a lock on it, which ends with its writer however that ends."""
    while True:
        temporary = folder / temporary_name()
        # O_EXCL with mode 0666: no predictable name to plant a link under, and the umask decides the final mode
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # before it was locked it may have passed for abandoned
        if temporary.exists():
            return temporary, descriptor
        os.close(descriptor)


@functools.cache
def _machine() -> str:
    """Four digits that stand for this machine."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:4]


def _remove_if_abandoned(temporary: Path) -> None:
    with contextlib.suppress(OSError), open(temporary, "ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        temporary.unlink()


def _remove_folder_if_abandoned(temporary: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(temporary)
        finally:
            os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Have the disk know which files a folder holds, where the file system lets us ask for that."""
    with contextlib.suppress(OSError):  # some file systems refuse to open or sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
