"""Which caches the runs share: those of the same dataset and the same model are one, made once.

A cache set is what one manifest describes: the items of a dataset file, encoded by one model. The configuration's own
dataset and models keep the plain names; others get their own manifest, named after what differs, and where their files
would take the place of another set's, a subfolder of the dataset's cache directory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from qwen_image.dataset.config import DatasetSettings
from qwen_image.files import safe_name

LATENT_MODEL = ("vae",)
TEXT_MODEL = ("caching_teo_text_encoder", "tokenizer", "caching_teo_fp8_vl")
"""Keys that say by what a cache is made."""
LATENT_SETTINGS = (
    "image_directory", "image_jsonl_file", "cache_directory", "resolution", "enable_bucket", "bucket_no_upscale",
    "alpha_background",
)  # fmt: skip
TEXT_SETTINGS = ("image_directory", "image_jsonl_file", "cache_directory", "caption_extension", "multiple_captions")
"""Settings of a dataset that bear on what is encoded, and on where it goes."""


@dataclass(frozen=True)
class CacheSet:
    """What one manifest describes."""

    dataset: str
    """Name of the dataset file, safe in any path."""
    variant: str
    """What differs from the configuration's own model, safe in any path; empty for that itself."""
    config: Mapping[str, Any]
    """A resolved configuration that uses it; all that do agree in the dataset and the model."""

    @property
    def name(self) -> str:
        """Safe in any path; of the manifest's folder."""
        return ".".join(filter(None, (self.dataset, self.variant)))

    @property
    def dataset_config(self) -> str:
        """The dataset file."""
        return self.config["dataset_config"]


def dataset_names(files: Sequence[str]) -> dict[str, str]:
    """Return a name for each dataset file, safe in any path. The first file keeps its plain name."""
    names: dict[str, str] = {}
    plain = [safe_name(PurePath(file).stem) for file in files]
    for file, name in zip(files, plain, strict=True):
        names.setdefault(file, name if plain.count(name) == 1 or file == files[0] else f"{name}-{_hash(file)}")
    return names


def cache_sets(
    runs: Mapping[str, Mapping[str, Any]], base: Mapping[str, Any], model: Sequence[str]
) -> dict[str, CacheSet]:
    """Return each run's cache set; runs of one dataset and model have the same one.

    `runs` and `base`, the configuration without what runs set, are resolved; `model` are the keys that say by what.
    """
    names = dataset_names(dataset_files(runs, base))
    labels = {key: _labels([base[key], *(run[key] for run in runs.values())]) for key in model}
    sets: dict[str, CacheSet] = {}
    for run, config in runs.items():
        differing = [f"{key}-{labels[key][config[key]]}" for key in model if config[key] != base[key]]
        one = CacheSet(names[config["dataset_config"]], safe_name(".".join(differing)) if differing else "", config)
        sets[run] = next((other for other in sets.values() if other.name == one.name), one)
    return sets


def dataset_files(runs: Mapping[str, Mapping[str, Any]], base: Mapping[str, Any]) -> list[str]:
    """Return the dataset files, the configuration's own first."""
    return list(dict.fromkeys(config["dataset_config"] for config in (base, *runs.values())))


def prompt_sets(runs: Mapping[str, Mapping[str, Any]], texts: Mapping[str, CacheSet]) -> dict[str, str]:
    """Return the name of the texts that belong to no picture, for each run that has any.

    They are its sample prompts and the empty caption. A single run's are named after it. `texts` are the runs' sets of
    captions, made by the same model.
    """
    having = {name: config for name, config in runs.items() if config.get("sample_prompts") or drops_captions(config)}
    if len(runs) == 1:
        return {name: name for name in having}
    files = {name: config.get("sample_prompts") for name, config in having.items()}
    labels = _labels([file for file in files.values() if file]) | {None: ""}
    parts = {
        name: (labels[files[name]], "empty_caption" if drops_captions(config) else "", texts[name].variant)
        for name, config in having.items()
    }
    return {name: safe_name(".".join(filter(None, several))) for name, several in parts.items()}


def drops_captions(config: Mapping[str, Any]) -> bool:
    """Whether the training uses the empty caption."""
    return config.get("caption_dropout_rate", 0) > 0


def uses_prompts(config: Mapping[str, Any]) -> bool:
    """Whether the training itself reads texts that belong to no picture."""
    sampling = ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")
    return drops_captions(config) or any(config.get(key, False) for key in sampling)


def subfolder(one: CacheSet, datasets: Mapping[str, Sequence[DatasetSettings]], settings: Sequence[str]) -> str:
    """Return the subfolder of the cache directories that a set's files go to; empty where they are in nobody's way.

    `datasets` are the settings by dataset file, the configuration's own first: whose files are in the way of an earlier
    one's makes way. `settings` are the ones that bear on this kind of cache.
    """
    staying: list[str] = []
    for file, mine in datasets.items():
        others = [other for earlier in staying for other in datasets[earlier]]
        if not any(_clash(own, other, settings) for own in mine for other in others):
            staying.append(file)
    return ".".join(filter(None, ("" if one.dataset_config in staying else one.dataset, one.variant)))


def _clash(one: DatasetSettings, other: DatasetSettings, settings: Sequence[str]) -> bool:
    """Whether two datasets write different files into one folder."""
    if os.path.realpath(one.cache_directory) != os.path.realpath(other.cache_directory):
        return False
    return any(getattr(one, key) != getattr(other, key) for key in settings if key != "cache_directory")


def _labels(values: Sequence[Any]) -> dict[Any, str]:
    """Return a short name for each value, safe in any path: of a path its last part, and a hash where it is shared."""
    unique = list(dict.fromkeys(values))
    plain = {value: safe_name(PurePath(str(value)).stem or "none").lower() for value in unique}
    shared = [label for label in plain.values() if list(plain.values()).count(label) > 1]
    return {value: f"{label}-{_hash(str(value))}" if label in shared else label for value, label in plain.items()}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
