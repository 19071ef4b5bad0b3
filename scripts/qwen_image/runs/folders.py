"""Where the cache files of several runs go: who shares a folder with whom, and who makes way."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from qwen_image.dataset.config import DatasetSettings, load_dataset_config
from qwen_image.files import safe_name
from qwen_image.problems import InputError, Problem
from qwen_image.runs.caches import CacheSet

LATENT_SETTINGS = (
    "image_directory", "image_jsonl_file", "cache_directory", "resolution", "enable_bucket", "bucket_no_upscale",
    "alpha_background",
)  # fmt: skip
TEXT_SETTINGS = ("image_directory", "image_jsonl_file", "cache_directory", "caption_extension", "multiple_captions")
"""Settings of a dataset that bear on what is encoded, and on where it goes."""
Datasets = Mapping[str, Sequence[DatasetSettings]]
"""The datasets' settings by dataset file, of all files that runs use."""


def own_datasets(own: Mapping[str, Any], datasets: Datasets) -> Sequence[DatasetSettings]:
    """Return the settings of the configuration's own datasets; none where it names no file that can be read.

    `own` is from `runs.caches.own_values`.
    """
    file = own.get("dataset_config")
    if file is None or file in datasets:
        return datasets.get(file, ())
    with suppress(InputError):  # no run uses it
        return load_dataset_config(file)
    return ()


def subfolder(one: CacheSet, datasets: Datasets, own: Mapping[str, Any], settings: Sequence[str]) -> str:
    """Return the subfolder of the cache directories that a set's files go to; empty for these themselves.

    What is encoded by the configuration's own model stays, unless it would take the place of what is encoded of the
    configuration's own datasets. `settings` are the ones that bear on this kind of cache.
    """
    base = _folders(own_datasets(own, datasets), settings)
    apart = _clash(_folders(datasets[one.dataset_config], settings), base)
    parts = ".".join(filter(None, (one.dataset if apart else "", one.variant)))
    return safe_name(parts) if parts else ""


def makers_before(
    sets: Iterable[CacheSet], datasets: Datasets, own: Mapping[str, Any], settings: Sequence[str]
) -> dict[str, list[str]]:
    """Return, by each set's name, the names of the sets that make files which it shares, and that it has to wait for.

    Datasets that differ in nothing that is encoded share their files. Two jobs that found nothing would both encode
    everything. `sets` are all of a kind.
    """
    places = {}
    for one in sorted(sets, key=lambda one: (one.dataset_config != own.get("dataset_config"), one.name)):
        below = subfolder(one, datasets, own, settings)
        places[one.name] = [(folder, below) for folder in _folders(datasets[one.dataset_config], settings)]
    first: dict[tuple[str, str], str] = {}
    makers = {name: [first.setdefault(place, name) for place in its] for name, its in places.items()}
    return {name: [one for one in dict.fromkeys(ones) if one != name] for name, ones in makers.items()}


def folder_problems(datasets: Datasets, own: Mapping[str, Any], file: str) -> list[Problem]:
    """Return which datasets would write different files into one folder, where nothing says who makes way for whom.

    For the configuration's own datasets all others do. `file` is the configuration.
    """
    mend = (
        f"give it a cache_directory of its own; or set dataset_config in {file}: the files of that one stay there, and "
        "others go to a subfolder"
    )
    problems = []
    for settings in (LATENT_SETTINGS, TEXT_SETTINGS):
        base = _folders(own_datasets(own, datasets), settings)
        first: dict[str, tuple[str, tuple]] = {}
        for path, several in datasets.items():
            folders = _folders(several, settings)
            for folder, what in folders.items() if not _clash(folders, base) else ():
                other, expected = first.setdefault(folder, (path, what))
                if what != expected:
                    found = f"its folder {folder} is that of {other} too, which caches different files there"
                    problems.append(Problem(file=path, key="cache_directory", found=found, mend=mend))
    return list(dict.fromkeys(problems))


def _folders(datasets: Iterable[DatasetSettings], settings: Sequence[str]) -> dict[str, tuple]:
    """What is encoded into each folder: the values of the settings, but for the folder itself."""
    keys = [key for key in settings if key != "cache_directory"]
    return {os.path.realpath(one.cache_directory): tuple(getattr(one, key) for key in keys) for one in datasets}


def _clash(one: Mapping[str, tuple], other: Mapping[str, tuple]) -> bool:
    """Whether different files go into a folder of both."""
    return any(other.get(folder, what) != what for folder, what in one.items())
