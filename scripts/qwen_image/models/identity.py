"""A model's identity: the hash of its files' content, computed once a file and remembered."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from qwen_image.files import FileMemo, is_sha256, lock, sha256_files

LARGE = 2**30
"""Bytes from which on a file takes long enough to show how far its reading is."""
CHUNK = 2**24
"""Bytes read at once."""


def model_identity(files: Sequence[str | Path], folder: str | Path) -> str:
    """Return one hash for the content of a model's files: runs at the same time wait for the first one's.

    The files' hashes are remembered in the folder, in a hidden file that may be deleted at any time. Raises OSError
    for a file that cannot be read.
    """
    memo_path = Path(folder) / ".models.hashes.json"
    try:
        with lock(memo_path.with_name(".models.lock")):
            return _remembered(files, memo_path)
    except OSError:  # a folder that cannot be written: nothing is remembered there
        return _remembered(files, memo_path)


def _remembered(files: Sequence[str | Path], memo_path: Path) -> str:
    memo = FileMemo(memo_path, lambda values: len(values) == 1 and is_sha256(values[0]))
    identity = sha256_files(files, memo, _hash_with_progress)
    memo.save(keep_others=True)
    return identity


def _hash_with_progress(path: str | Path) -> str:
    """Return the hex SHA-256 of a file's content; of a large one, show how much is read."""
    size, digest = os.path.getsize(path), hashlib.sha256()
    bar = tqdm(
        desc=f"look at {Path(path).name} (once)", total=size, unit="B", unit_scale=True, mininterval=5,
        disable=size < LARGE,
    )  # fmt: skip
    with open(path, "rb") as stream, bar:
        while part := stream.read(CHUNK):
            digest.update(part)
            bar.update(len(part))
    return digest.hexdigest()
