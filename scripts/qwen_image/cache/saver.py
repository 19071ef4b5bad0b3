"""Writes finished cache files behind the encoder, so that it never waits for a disk."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from qwen_image.cache.fingerprint import ARITHMETIC_KEY, DATA_KEY, DETERMINISTIC, FAST, fingerprint_metadata
from qwen_image.cache.foreign import set_aside
from qwen_image.cache.stage import Encoded, Entry
from qwen_image.container import data_sha256, write_safetensors
from qwen_image.dataset.items import Reject
from qwen_image.problems import InputError, Problem

THREADS = 4
AHEAD = 64
"""Files that may wait to be written: memory stays bounded when the disk is slower than the encoder."""
STOPPING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
"""Errors that the next file would meet as well."""


class Saver:
    """Saves in threads. Leaving its ``with`` block waits for every file, also when the encoder failed."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="save")
        self._waiting: deque[tuple[Entry, Future]] = deque()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)

    def save(self, result: Encoded) -> Iterator[Entry | Reject]:
        """Take one result over; yield the earlier ones whose files are finished, as their entries or as rejects."""
        self._waiting.append((result.entry, self._pool.submit(_write, result)))
        while self._waiting and (len(self._waiting) > AHEAD or self._waiting[0][1].done()):
            yield _finished(*self._waiting.popleft())

    def rest(self) -> Iterator[Entry | Reject]:
        """Wait for the files that are under way and yield them."""
        while self._waiting:
            yield _finished(*self._waiting.popleft())


def _write(result: Encoded) -> None:
    arithmetic = DETERMINISTIC if result.deterministic else FAST
    metadata = {
        **result.entry.metadata,
        **fingerprint_metadata(result.entry.parts),
        ARITHMETIC_KEY: arithmetic,
        DATA_KEY: data_sha256(result.tensors),
    }
    set_aside(result.entry.path)
    write_safetensors(result.entry.path, result.tensors, metadata)


def _finished(entry: Entry, future: Future) -> Entry | Reject:
    """Return the entry; a reject where this one file cannot be written; raise InputError where none can be."""
    try:
        future.result()
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in STOPPING:
            mend = "mend that and run the same command again; what is cached so far is kept"
            found = f"cannot be written: {reason}"
            raise InputError([Problem(file=os.fspath(entry.path), found=found, mend=mend)]) from error
        return entry.reject(f"its cache file {entry.path} cannot be written: {reason}")
    return entry
