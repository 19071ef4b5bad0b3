"""Asks, before the first file is written, whether all of them can be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from qwen_image.problems import InputError, Problem

BLOCK = 4096
"""Bytes that file systems give out at once, as a rule."""


def check_space(files: Iterable[tuple[Path, int]]) -> int:
    """Return the bytes that these files (path, size) take.

    Raises InputError for every folder that may not be written to and every disk that they do not fit on.
    """
    needed: dict[int, int] = {}
    folders: dict[int, Path] = {}
    problems = {}
    for path, size in files:
        folder = _existing(path.parent)
        device = folder.stat().st_dev
        folders.setdefault(device, folder)
        needed[device] = needed.get(device, 0) + -(-size // BLOCK) * BLOCK
        if not os.access(folder, os.W_OK | os.X_OK):
            mend = "give yourself the right to write there, or name another cache_directory"
            problems[folder] = Problem(file=str(folder), found="cannot be written to", mend=mend)
    for device, folder in folders.items():
        free = shutil.disk_usage(folder).free
        if needed[device] > free:
            found = f"{readable(needed[device])} of cache files do not fit, {readable(free)} are free on this disk"
            mend = "free some space, or name a cache_directory on another disk; nothing has been written"
            problems[folder] = Problem(file=str(folder), found=found, mend=mend)
    if problems:
        raise InputError(list(problems.values()))
    return sum(needed.values())


def readable(size: float) -> str:
    """Return a number of bytes for people, for example ``3.2 GB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
