"""What listing a dataset gives (items, rejects), and the rules that its two kinds, folder and JSONL file, share."""

from __future__ import annotations

import os
from dataclasses import dataclass

from qwen_image.problems import Problem

MAX_STEM_BYTES = 225
"""A file name has at most 255 bytes, of which cache files add up to 27: ``_10000x10000_qi.safetensors``."""
MAX_CAPTION_BYTES = 2**20
"""A caption's length; the model reads its first 1024 tokens, some 5 kB. A file beyond this is something else."""
MAX_PROBLEMS = 50
"""Problems of one kind told in full; a file in a wrong format would otherwise give one a line."""


@dataclass(frozen=True, slots=True)
class Item:
    """An image with its caption."""

    dataset: int
    """`DatasetSettings.index`."""
    key: str
    """The image's path relative to image_directory (its file name), or image_path as written in the JSONL file."""
    image_path: str
    caption_path: str | None
    """The caption's file; None when it stands in a JSONL file."""
    caption: str | tuple[str, ...] | None
    """The caption of a JSONL file, verbatim, or the captions of a list there; None when it is in `caption_path`."""

    @property
    def stem(self) -> str:
        """The image's file name without its last extension: what cache files are named by, unique in a dataset."""
        return stem_of(self.image_path)


@dataclass(frozen=True, slots=True)
class Reject:
    """An image that cannot be an item, and why. `key` and `path` are always printable."""

    dataset: int
    key: str
    path: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """What was found in a dataset, items and rejects each sorted by key."""

    items: list[Item]
    rejects: list[Reject]
    captions_found: int = 0
    """Captions seen, with an image or without one: for the message about a dataset of no items."""


def limit(problems: list[Problem]) -> list[Problem]:
    """The first `MAX_PROBLEMS` problems of one file and, when there are more, one that says how many."""
    more = len(problems) - MAX_PROBLEMS
    if more <= 0:
        return problems
    rest = Problem(file=problems[0].file, found=f"{more} more problems like these", mend="mend the ones above first")
    return [*problems[:MAX_PROBLEMS], rest]


def name_fault(stem: str) -> str | None:
    """Why the cache cannot have files named after an image of this stem, or None when it can."""
    try:
        size = len(stem.encode("utf-8"))
    except UnicodeEncodeError:
        return "its file name is not valid UTF-8; rename it"
    if size > MAX_STEM_BYTES:
        return f"its file name is too long ({size} bytes) to name cache files after it; {MAX_STEM_BYTES} is the most"
    return None


def printable(path: str) -> str:
    r"""The path with bytes that are not UTF-8 written as ``\xNN``, so that it can stand in a table."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def stem_of(path: str) -> str:
    """The path's file name without its last extension."""
    return os.path.splitext(os.path.basename(path))[0]
