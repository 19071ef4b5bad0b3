"""What a cache file was made from, kept in its own header: the memory of the cache, wherever the file is moved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from qwen_image.container import ContainerError, Header, read_header

FINGERPRINT_KEY = "fingerprint"
PARTS_KEY = "fingerprint_parts"
# made once: this runs for every item of a dataset, whether anything is to be done or not
_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)
# how a file's bytes came about: no part of the fingerprint, because every way is right within the encoder's tolerance
ARITHMETIC_KEY = "arithmetic"
DETERMINISTIC = "deterministic"  # they depend on the item, the model and the settings alone
FAST = "fast"  # batched or compiled: the last bits depend on what else was encoded
ADOPTED = "adopted"  # another program's
# the SHA-256 of the tensors, by which a training knows a file whose bits have changed
DATA_KEY = "data_sha256"
# raise one of these when the code it names starts to give other values for the same input
PREPROCESSING_VERSION = "1"  # decoding, colour conversion, resize and crop
LATENT_ENCODER_VERSION = "2"  # pixels to normalised latents
TEXT_ENCODER_VERSION = "2"  # caption to embedding: template, truncation, dropped prefix


def fingerprint(parts: Mapping[str, str]) -> str:
    """Return the hex SHA-256 of the parts; equal parts in any order give the same value."""
    return hashlib.sha256(_canonical(parts)).hexdigest()


def fingerprint_metadata(parts: Mapping[str, str]) -> dict[str, str]:
    """Return the two metadata entries that a cache file carries: the hash, and the parts to explain it."""
    return {FINGERPRINT_KEY: fingerprint(parts), PARTS_KEY: _canonical(parts).decode()}


def read_matching_header(path: Path, parts: Mapping[str, str]) -> Header | None:
    """Return the cache file's header if the file is whole and was made from exactly these parts, else None."""
    header = read_cache_header(path)
    if header is None or not header.is_ours:
        return None
    return header if fingerprint_metadata(parts).items() <= header.metadata.items() else None


def is_ours(path: Path) -> bool:
    """Whether this project wrote the file: it is whole and carries a fingerprint that its own parts confirm."""
    header = read_cache_header(path)
    return header is not None and carries_fingerprint(header)


def carries_fingerprint(header: Header) -> bool:
    """Whether a header is of this project's making, fingerprint and all."""
    parts = header.metadata.get(PARTS_KEY, "")
    confirmed = hashlib.sha256(parts.encode()).hexdigest() == header.metadata.get(FINGERPRINT_KEY)
    return header.is_ours and confirmed


def read_cache_header(path: Path) -> Header | None:
    """Return the header, or None where there is no file or no whole one."""
    try:
        return read_header(path)
    except (OSError, ContainerError):
        return None


def _canonical(parts: Mapping[str, str]) -> bytes:
    return _JSON.encode(parts).encode()
