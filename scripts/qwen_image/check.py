"""The check stage: everything that can be known to be wrong before any work is done, in one message.

It reads the configuration, the dataset file, folder listings and checkpoint headers; it opens no picture, loads no
model and needs no GPU.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_image.config import check_config, resolve_config
from qwen_image.dataset.config import DatasetSettings, load_dataset_config
from qwen_image.dataset.items import Listing, list_datasets
from qwen_image.models.checkpoint import check_checkpoint
from qwen_image.models.tokenizer import check_tokenizer
from qwen_image.problems import InputError, Problem

Datasets = list[tuple[DatasetSettings, Listing]]


def check_all(config: Mapping[str, Any], file: str) -> tuple[dict[str, Any], Datasets]:
    """Check a configuration and everything it names. Returns it resolved, and its datasets listed.

    Raises InputError with every problem found.
    """
    problems = check_config(config, file)
    keys_at_fault = {problem.key for problem in problems}
    named = {key: value for key, value in config.items() if isinstance(value, str) and key not in keys_at_fault}
    problems += _check_models(named)
    problems += _check_output(named, file)
    datasets, dataset_problems = _check_datasets(named, str(config.get("on_bad_item", "error")))
    problems += dataset_problems
    if problems:
        raise InputError(problems)
    return resolve_config(config), datasets


def summary(datasets: Datasets) -> str:
    """Return what the datasets hold, one line each, for the check stage's report."""
    lines = []
    for settings, listing in datasets:
        source = settings.image_directory or settings.image_jsonl_file
        kinds = Counter(Path(item.image_path).suffix.lower().lstrip(".") for item in listing.items)
        kinds_text = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        width, height = settings.resolution
        lines.append(
            f"datasets[{settings.index}] {source}: {len(listing.items)} items ({kinds_text}), "
            f"{len(listing.rejects)} left out, {width}x{height}{' in buckets' if settings.enable_bucket else ''}, "
            f"batch size {settings.batch_size}, {settings.num_repeats} repeats"
        )
        lines += [f"  left out: {reject.path}: {reject.reason}" for reject in listing.rejects]
        if settings.control_directory:
            lines.append("  control_directory is not used: the original model has no control images")
    return "\n".join(lines) + "\n"


def _check_models(named: Mapping[str, str]) -> list[Problem]:
    problems = []
    for key in ("dit", "vae", "text_encoder"):
        if key in named:
            problems += check_checkpoint(named[key], key)
    encoder = named.get("caching_teo_text_encoder") or named.get("text_encoder")
    if "caching_teo_text_encoder" in named:
        problems += check_checkpoint(named["caching_teo_text_encoder"], "text_encoder")
    if encoder and os.path.exists(encoder):
        problems += check_tokenizer(encoder, named.get("tokenizer"))
    return problems


def _check_output(named: Mapping[str, str], file: str) -> list[Problem]:
    folder = Path(named.get("output_dir", "."))
    existing = next((path for path in (folder, *folder.parents) if path.exists()), Path("."))
    if not existing.is_dir():
        mend = "name a folder; it is made when it does not exist"
        return [Problem(file=file, key="output_dir", found=f"{existing} is not a folder", mend=mend)]
    if not os.access(existing, os.W_OK | os.X_OK):
        mend = "give yourself the right to write there, or name another folder"
        return [Problem(file=file, key="output_dir", found=f"{existing} cannot be written to", mend=mend)]
    return []


def _check_datasets(named: Mapping[str, str], on_bad_item: str) -> tuple[Datasets, list[Problem]]:
    if "dataset_config" not in named:
        return [], []
    try:
        settings = load_dataset_config(named["dataset_config"])
        listings = list_datasets(settings, named["dataset_config"])
    except InputError as error:
        return [], error.problems
    problems = _bad_items(listings) if on_bad_item == "error" else []
    problems += [problem for one in settings for problem in _check_cache_folder(one, named["dataset_config"])]
    return list(zip(settings, listings, strict=True)), problems


def _bad_items(listings: Sequence[Listing]) -> list[Problem]:
    mend = "mend or remove it, or set on_bad_item: skip to train without it"
    return [
        Problem(file=reject.path, found=reject.reason, mend=mend) for listing in listings for reject in listing.rejects
    ]


def _check_cache_folder(settings: DatasetSettings, file: str) -> list[Problem]:
    folder = Path(settings.cache_directory)
    if folder.exists() and not folder.is_dir():
        key = f"datasets[{settings.index}].cache_directory"
        return [Problem(file=file, key=key, found=f"{folder} is not a folder", mend="name a folder of its own")]
    return []
