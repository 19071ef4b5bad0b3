"""Asks, before the first file is written, whether all of them can be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from qwen_image.problems import InputError, Problem

BLOCK = 4096
"""Bytes that file systems give out at once, as a rule."""


def check_space(files: Sequence[tuple[Path, int]], *, waiting: int) -> int:
    """Return the bytes that these files (path, size) take, those that they replace not counted off.

    A file that is replaced frees its room only when the new one stands beside it, and `waiting` files may be under way.
    Raises InputError for every folder that may not be written to and every disk that they do not fit on.
    """
    problems, needed, folders = [], {}, {}
    for parent in sorted({path.parent for path, _ in files}):
        folders[parent] = folder = _existing(parent)
        if not os.access(folder, os.W_OK | os.X_OK):
            mend = "give yourself the right to write there, or name another cache_directory"
            problems.append(Problem(file=str(folder), found="cannot be written to", mend=mend))
    largest = max((size for _, size in files), default=0)
    devices = {parent: folder.stat().st_dev for parent, folder in folders.items()}
    for path, size in files:
        device = devices[path.parent]
        needed[device] = needed.get(device, waiting * largest) + max(0, _blocks(size) - _blocks(_size(path)))
    for device, folder in {devices[parent]: folder for parent, folder in folders.items()}.items():
        free = shutil.disk_usage(folder).free
        if needed[device] > free:
            found = f"{readable(needed[device])} of cache files do not fit, {readable(free)} are free on this disk"
            mend = "free some space, or name a cache_directory on another disk; nothing has been written"
            problems.append(Problem(file=str(folder), found=found, mend=mend))
    if problems:
        raise InputError(problems)
    return sum(_blocks(size) for _, size in files)


def readable(size: float) -> str:
    """Return a number of bytes for people, for example ``3.2 GB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
