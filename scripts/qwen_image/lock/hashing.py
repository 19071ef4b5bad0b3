"""Files hashed, and the data of those that were made here compared on the way with the hash in their own header."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qwen_image.bounded import open_file
from qwen_image.cache.fingerprint import DATA_KEY, read_cache_header

DATA_HASHES = (DATA_KEY, "sshs_model_hash")
"""What the hash of a file's data is called in the header of a cache file, and of a LoRA."""
DAMAGED = "is damaged: its values are not those that were written"
CHUNK = 2**20


def content_sha256(path: Path) -> str:
    """Return the SHA-256 of a file. Raises OSError, or ValueError for a pipe or a device."""
    with open_file(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def made_sha256(path: Path) -> tuple[str, bool]:
    """Return the SHA-256 of a file, and whether its data are those that its own header names, where it names any.

    Raises OSError, or ValueError for a pipe or a device.
    """
    header = read_cache_header(path)
    expected = next((header.metadata[key] for key in DATA_HASHES if key in header.metadata), None) if header else None
    if expected is None:
        return content_sha256(path), True
    whole, data = hashlib.sha256(), hashlib.sha256()
    with open_file(path) as stream:
        whole.update(stream.read(header.data_start))
        while part := stream.read(CHUNK):
            whole.update(part)
            data.update(part)
    return whole.hexdigest(), data.hexdigest() == expected
