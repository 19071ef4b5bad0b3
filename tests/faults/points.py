"""Which fault happens when: drawn from a number, so that any of them can be played again."""

from __future__ import annotations

import random
from dataclasses import dataclass

CACHING = ("qwen_image_cache_latents.py", "qwen_image_cache_text_encoder_outputs.py")
TRAINING = ("write_train_config.py", "qwen_image_train_network.py", "check_lora.py")
ALL = ("make_demo.py", "check_config.py", *CACHING, "merge_manifests.py", *TRAINING)
# a cache or a manifest must be there to be damaged
WITH_CACHE = (*CACHING, "merge_manifests.py", "qwen_image_train_network.py", "check_lora.py")
WITH_MANIFEST = ("merge_manifests.py", "qwen_image_train_network.py", "check_lora.py")
READING = (*CACHING, "merge_manifests.py", "qwen_image_train_network.py", "check_lora.py")
KINDS = {
    "kill -9 of the stage": ALL,
    "kill -9 of the process group": ALL,
    "kill -9 of Snakemake": ALL,
    "SIGTERM to the stage": ALL,
    "SIGTERM to the process group": ALL,
    "SIGTERM to Snakemake": ALL,
    "disk full": ALL,
    "file size limit": ALL,
    "read error": READING,
    "cache file truncated": WITH_CACHE,
    "cache file bit-flipped": WITH_CACHE,
    "cache file deleted": WITH_CACHE,
    "cache file became a directory": WITH_CACHE,
    "manifest deleted": WITH_MANIFEST,
    "manifest edited": WITH_MANIFEST,
    "clock set back": ALL,
    "another workflow": ALL,
    "another workflow, --nolock": ALL,
}
"""By name, the programs in which it may happen."""


@dataclass(frozen=True)
class Point:
    """One fault at one moment."""

    seed: int
    kind: str
    program: str
    moment: float
    """Which of the program's operations on files is the last before it, as a share of all."""

    def __str__(self) -> str:
        return f"point {self.seed}: {self.kind}, {self.program} at {self.moment:.0%}"


def draw(seed: int) -> Point:
    """Return a point; consecutive numbers go through all kinds."""
    choice = random.Random(seed)
    kind = list(KINDS)[seed % len(KINDS)]
    return Point(seed, kind, choice.choice(KINDS[kind]), choice.random())
