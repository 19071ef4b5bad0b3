"""The keys that a run may set: those of the configuration, but for what holds for all runs. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Hashable
from typing import Any

from qwen_image.config import known_keys, normalise, value_schema
from qwen_image.problems import Problem

TABLE, GRID, NAME = "runs", "runs_grid", "output_name"
MAX_RUNS = 10_000
"""Snakemake takes a second for a few hundred."""
LONGEST_NAME = 120
"""Of a run, in characters."""
LONGEST_SHOWN = 100
"""Characters of a name or a value that stand in a message."""
SHARED = {
    "output_dir": "the LoRAs of a table go into one folder, each under its own output_name",
    "caching_shards": "a cache is made once, for all runs that use it",
    "on_bad_item": "a cache is made once, for all runs that use it",
    "deterministic": "a cache is made once, for all runs that use it",
    "adopt_existing": "a cache is made once, for all runs that use it",
    **{
        f"caching_{stage}_{key}": "a cache is made once, for all runs that use it"
        for stage in ("latent", "teo")
        for key in ("device", "batch_size", "num_workers", "skip_existing", "keep_cache")
    },
    TABLE: "a run has no runs of its own",
    GRID: "a run has no runs of its own",
}
"""Keys that hold for all runs, and why no run has its own."""
IN_DATASET_FILE = ("resolution", "enable_bucket", "bucket_no_upscale", "num_repeats", "batch_size", "cache_directory")
"""Keys that people look for here, and that belong into the dataset file."""


def key_faults(keys: Collection[object], place: str) -> list[Problem]:
    """Return what is wrong with the names of the keys that runs set. `place` is where they stand."""
    if len(keys) > len(known_keys()):
        # looking for what each may have meant would take minutes
        found, mend = f"names {len(keys)} keys", f"there are only {len(known_keys())}; config/README.md lists them"
        return [Problem(file=place, found=found, mend=mend)]
    return [problem for key in map(str, keys) if (problem := _key_fault(key, place)) is not None]


def _key_fault(key: str, place: str) -> Problem | None:
    if key in SHARED:
        mend = "set it in the configuration file"
        return Problem(file=place, key=key, found=f"holds for all runs: {SHARED[key]}", mend=mend)
    if key in known_keys():
        return None
    if key in IN_DATASET_FILE:
        mend = "write a second dataset file, and name it in a column dataset_config"
        return Problem(file=place, key=key, found="is a key of the dataset file", mend=mend)
    close = difflib.get_close_matches(key[:LONGEST_SHOWN], known_keys(), n=1)
    mend = f"did you mean {close[0]}?" if close else "remove it; config/README.md lists the keys"
    return Problem(file=place, key=cut(key) or "(no name)", found="is not a known key", mend=mend)


def meaning(key: str, value: Any) -> Hashable:
    """Return what stands for the value and is equal for two that make the same training: ``"1e-4"`` and 0.0001."""
    return _comparable(normalise({key: value}).get(key, value_schema(key).get("default")))


def cut(text: str) -> str:
    """Return the text as far as a message shows it."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}... ({len(text)} characters)"


def _comparable(value: Any) -> Hashable:
    if isinstance(value, list):
        return tuple(map(_comparable, value))
    # 1 and 1.0 are one number, and true is none
    return value if isinstance(value, int | float | str) and not isinstance(value, bool) else repr(value)
