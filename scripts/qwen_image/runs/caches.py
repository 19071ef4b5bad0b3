"""Which caches the runs share: those of the same dataset and the same model are one, made once.

A cache set is what one manifest describes: the items of a dataset file, encoded by one model. The configuration's own
dataset and models have the plain names. What only rows name has its own manifest, called after it with a short hash.
Where its files would take the place of others they go to a subfolder of the dataset's cache directory (folders.py).
A name follows from the value that it stands for and from the configuration's own values alone: which other rows there
are, and in which order, renames nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from qwen_image.config import normalise, resolve_config
from qwen_image.files import safe_name
from qwen_image.runs.keys import GRID, LONGEST_NAME, TABLE

LATENT_MODEL = ("vae",)
TEXT_MODEL = ("caching_teo_text_encoder", "tokenizer", "caching_teo_fp8_vl")
"""Keys that say by what a cache is made."""
NAMING = ("dataset_config", "vae", "text_encoder", "caching_teo_text_encoder", "tokenizer", "sample_prompts")
"""Keys of paths that caches are named after, where a run sets them itself."""
NO_HOME = "runs"
"""The folder of what belongs to the whole configuration, where that leaves the dataset to its runs."""
OUTSIDE = "external"
"""The folder in which a rebuild has the inputs that lay outside of the working directory."""


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


def own_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a configuration itself says, defaults filled in; without the models and datasets left to its runs."""
    shared = normalise({key: value for key, value in config.items() if key not in (TABLE, GRID)})
    return {key: value for key, value in resolve_config({"text_encoder": "", **shared}).items() if value != ""}


def home(own: Mapping[str, Any]) -> str:
    """Return the folder, safe in any path, of what belongs to the whole configuration. `own` is from `own_values`."""
    return dataset_name(own["dataset_config"], own) if "dataset_config" in own else NO_HOME


def dataset_name(file: str, own: Mapping[str, Any]) -> str:
    """Return a dataset file's name, safe in any path; the plain one for the configuration's own."""
    plain = safe_name(PurePath(file).stem)
    return plain if file == own.get("dataset_config") else f"{plain}-{path_tag(file)}"


def dataset_files(runs: Mapping[str, Mapping[str, Any]], own: Mapping[str, Any]) -> list[str]:
    """Return the dataset files that runs use, the configuration's own first."""
    files = dict.fromkeys(config["dataset_config"] for config in runs.values())
    return sorted(files, key=lambda file: file != own.get("dataset_config"))


def cache_sets(
    runs: Mapping[str, Mapping[str, Any]], own: Mapping[str, Any], model: Sequence[str]
) -> dict[str, CacheSet]:
    """Return each run's cache set; runs of one dataset and model have the same one.

    `runs` are resolved, `own` is from `own_values`; `model` are the keys that say by what.
    """
    sets: dict[str, CacheSet] = {}
    by_name: dict[str, CacheSet] = {}
    for run, config in runs.items():
        differing = [f"{key}-{_label(config[key])}" for key in model if key not in own or config[key] != own[key]]
        variant = safe_name(".".join(differing)) if differing else ""
        one = CacheSet(dataset_name(config["dataset_config"], own), variant, config)
        sets[run] = by_name.setdefault(one.name, one)
    return sets


def prompt_sets(
    runs: Mapping[str, Mapping[str, Any]], own: Mapping[str, Any], texts: Mapping[str, CacheSet]
) -> dict[str, str]:
    """Return the name of the texts that belong to no picture, for each run that has any.

    They are its sample prompts and the empty caption. The configuration's own are named after its output_name. `texts`
    are the runs' sets of captions, made by the same model.
    """
    having = {name: config for name, config in runs.items() if config.get("sample_prompts") or drops_captions(config)}
    return {name: _prompts_name(config, own, texts[name].variant) for name, config in having.items()}


def drops_captions(config: Mapping[str, Any]) -> bool:
    """Whether the training uses the empty caption."""
    return config.get("caption_dropout_rate", 0) > 0


def uses_prompts(config: Mapping[str, Any]) -> bool:
    """Whether the training itself reads texts that belong to no picture."""
    sampling = ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")
    return drops_captions(config) or any(config.get(key, False) for key in sampling)


def path_tag(path: str) -> str:
    """Return a short hash of a path as it is written; of a rebuild's input from outside that of the locked path."""
    stands_for = re.fullmatch(rf"{OUTSIDE}/(?:{'|'.join(NAMING)})-([0-9a-f]{{8}})/[^/]+", path)
    return stands_for[1] if stands_for else _hash(path)


def _prompts_name(config: Mapping[str, Any], own: Mapping[str, Any], variant: str) -> str:
    file, drops = config.get("sample_prompts"), drops_captions(config)
    if "output_name" in own and not variant and (file, drops) == (own.get("sample_prompts"), drops_captions(own)):
        return safe_name(own["output_name"], LONGEST_NAME)
    parts = (safe_name(PurePath(file).stem) if file else "", "empty_caption" if drops else "", variant)
    return f"{'.'.join(filter(None, parts))}-{_hash(json.dumps([path_tag(file) if file else '', drops, variant]))}"


def _label(value: object) -> str:
    """A short name for a model's value, safe in any path: of a path its last part, and a hash."""
    if not isinstance(value, str):
        return str(value).lower()
    return f"{safe_name(PurePath(value).stem or 'none').lower()}-{path_tag(value)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
