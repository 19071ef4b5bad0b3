"""What an encoder must bring along to be a caching stage, and what passes between it and the cache (see update.py)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qwen_image.container import Header
from qwen_image.dataset.config import DatasetSettings
from qwen_image.dataset.items import Item, Reject

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Entry:
    """One item and a cache file it must have."""

    item: Item
    path: Path
    parts: Mapping[str, str]
    """What the file is made from; see fingerprint.py."""
    columns: Mapping[str, object]
    """The manifest columns that are known before encoding."""
    metadata: Mapping[str, str]
    """The field's metadata for the file, without the fingerprint."""
    payload: object = None
    """What the stage's encoder needs to know besides."""

    def reject(self, reason: str) -> Reject:
        """Return the item as one that cannot be used."""
        return Reject(self.item.dataset, self.item.key, self.item.image_path, reason)


@dataclass(frozen=True)
class Encoded:
    """One encoder output, ready to be written."""

    entry: Entry
    tensors: Mapping[str, torch.Tensor]
    deterministic: bool = False
    """Whether these bytes depend on the item, the model and the settings alone, whatever else was encoded."""


@dataclass
class Stopwatch:
    """How long the encoder itself was at work: ``with watch: encode()``."""

    seconds: float = 0.0
    _start: float = field(default=0.0, repr=False)

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic() - self._start


class Stage(Protocol):
    """What the two encoders have to say for themselves."""

    title: str
    suffix: str
    columns: Mapping[str, type]
    watch: Stopwatch
    """Runs while the model computes."""

    def plan(self, item: Item, settings: DatasetSettings) -> list[Entry]:
        """Say what the item's cache files must be. Raises ValueError or OSError for an item that cannot be used."""

    def output_bytes(self, entries: list[Entry]) -> list[int]:
        """Return how large each cache file will be, near enough to see whether they fit on the disk."""

    def encode(self, entries: list[Entry]) -> Iterator[Encoded | Reject]:
        """Load the model and encode, in any order."""

    def describe(self, header: Header) -> dict[str, object]:
        """Return the manifest columns that are read off the finished file."""

    def misfit(self, entry: Entry, header: Header) -> str | None:
        """Return why a cache file that another program wrote is not what this entry needs, or None if it is."""
