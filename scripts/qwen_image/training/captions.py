"""Which caption an item is trained with on each visit: one of its own by chance, or the empty one.

A visit's caption follows from the seed, the epoch, the item and the repeat alone, so a training that goes on later
draws the same again. Imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen_image.cache.prompts import read_prompts, text_sha256
from qwen_image.problems import InputError, Problem
from qwen_image.training.randomness import derived_seed

if TYPE_CHECKING:
    from qwen_image.training.arguments import Settings
    from qwen_image.training.items import CacheFile, TrainingItem


class CaptionChoice:
    """Chooses the captions of a training; data-loader workers each hold one and choose the same."""

    def __init__(self, settings: Settings, empty: CacheFile | None) -> None:
        """`empty` is the empty caption's cache file, as `empty_caption` returns it."""
        self._seed = settings.seed
        self._dropout_rate = settings.caption_dropout_rate
        self._empty = empty

    def file(self, item: TrainingItem, epoch: int, repeat: int) -> CacheFile:
        """Return the cache file of the caption for one visit to an item."""
        visit = (self._seed, epoch, item.dataset, item.key, repeat)
        # compared as whole numbers, so that a rate of 1 drops every caption and 0 none
        if derived_seed("caption dropout", *visit) < self._dropout_rate * 2**63:
            assert self._empty is not None
            return self._empty
        return item.texts[derived_seed("caption", *visit) % len(item.texts)]


def empty_caption(settings: Settings) -> CacheFile | None:
    """Return the empty caption's cache file where captions are dropped, None where none are.

    Raises InputError when it is needed and not cached.
    """
    if not settings.caption_dropout_rate:
        return None
    manifest = settings.prompts_manifest
    empty = read_prompts(manifest).get(text_sha256("")) if manifest is not None else None
    if empty is None:
        found = f"{settings.caption_dropout_rate} needs the empty caption's text-encoder output, and "
        found += "prompts_manifest is not set" if manifest is None else f"{manifest} does not list it"
        mend = (
            "run scripts/qwen_image_cache_prompts.py with --empty_caption and give its manifest as prompts_manifest "
            "(snakemake does both), or remove the key"
        )
        raise InputError([Problem(file="settings", key="caption_dropout_rate", found=found, mend=mend)])
    return empty
