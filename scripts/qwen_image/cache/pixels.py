"""Decodes and resizes pictures in worker processes that stay a bounded way ahead of the encoder.

Processes, because decoders hold the interpreter's lock for long, and because one that crashes takes only itself along.
Nothing here imports torch: a worker starts in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait

import numpy as np

from qwen_image.dataset.images import fit_to_bucket, load_image
from qwen_image.files import sha256_file

CHANGED = "it changed while the program ran; run the same command again"
CRASHED = "the process that decodes it died, twice; convert it to PNG, or remove it (or memory ran out)"


@dataclass(frozen=True, slots=True)
class Picture:
    """What is to be made of an image file."""

    path: str
    sha256: str
    """The content that it must have."""
    bucket: tuple[int, int]
    """(W, H) in pixels."""
    background: str


class PixelReader:
    """Yields the pixels of pictures in their order, uint8 (H, W, 3), or the reason why a picture gives none.

    At most `ahead` pictures are under way or waiting. Work begins on entering the ``with`` block, so that it overlaps
    with loading a model.
    """

    def __init__(self, pictures: Sequence[Picture], *, workers: int, ahead: int) -> None:
        self._coming = iter(pictures)
        self._workers = min(workers, len(pictures))
        self._ahead = ahead
        self._waiting: deque[tuple[Picture, Future]] = deque()

    def __enter__(self) -> PixelReader:
        self._pool = _processes(self._workers)
        self._fill()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __iter__(self) -> Iterator[np.ndarray | str]:
        while self._waiting:
            picture, future = self._waiting.popleft()
            try:
                pixels = future.result()
            except BrokenProcessPool:
                pixels = self._recover(picture)
            # the next one is asked for before this one is encoded
            self._fill()
            yield pixels

    def _fill(self) -> None:
        while len(self._waiting) < self._ahead and (picture := next(self._coming, None)):
            self._waiting.append((picture, _submit(self._pool, picture)))

    def _recover(self, picture: Picture) -> np.ndarray | str:
        """A worker died, nobody knows on which picture: try this one alone, and hand the others out again."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with _processes(1) as alone:
            try:
                pixels = alone.submit(_decode, picture).result()
            except BrokenProcessPool:
                pixels = CRASHED
        self._pool = _processes(self._workers)
        self._waiting = deque((other, _submit(self._pool, other)) for other, _ in self._waiting)
        return pixels


def _submit(pool: Executor, picture: Picture) -> Future:
    try:
        return pool.submit(_decode, picture)
    except BrokenProcessPool as error:  # it broke a moment ago: the same as a future that says so
        future: Future = Future()
        future.set_exception(error)
        return future


def _processes(count: int) -> ProcessPoolExecutor:
    # started afresh, not forked: a fork of a process with threads may hang
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    import cv2

    cv2.setNumThreads(1)  # the encoder needs the other CPUs
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _decode(picture: Picture) -> np.ndarray | str:
    try:
        pixels = fit_to_bucket(load_image(picture.path, picture.background), picture.bucket)
        return pixels if sha256_file(picture.path) == picture.sha256 else CHANGED
    except MemoryError:
        return "there is not enough memory to decode it"
    except Exception as error:  # one picture's trouble, whatever the libraries call it, is not the others'
        return str(error) or type(error).__name__
