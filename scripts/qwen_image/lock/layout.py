"""Where a workflow's datasets, caches and runs lie, told from its configuration alone: the paths of rules/common.smk.

All paths are relative to the working directory. Where the user wrote a path that leaves it, the lock has another in its
place (see `Places`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from qwen_image.config import resolve_config
from qwen_image.files import safe_name
from qwen_image.runs.caches import (
    LATENT_MODEL,
    OUTSIDE,
    TEXT_MODEL,
    CacheSet,
    cache_sets,
    dataset_files,
    dataset_name,
    home,
    own_values,
    path_tag,
    prompt_sets,
)
from qwen_image.runs.table import GRID, LONGEST_NAME, TABLE, Run, expand_runs

KINDS = ("latents", "text_encoder_outputs")
PATHS = (
    "dataset_config", "dit", "vae", "text_encoder", "caching_teo_text_encoder", "tokenizer", "output_dir",
    "logging_dir", "sample_prompts", "network_weights", "base_weights", "log_tracker_config", "resume",
)  # fmt: skip
"""Keys of the configuration whose values are paths."""
DATASET_PATHS = ("image_directory", "image_jsonl_file", "control_directory", "cache_directory")
"""The same of a dataset file."""


class Places:
    """Paths as they may stand in a lock: those within the working directory as written, others by their last name.

    ``/models/dit.safetensors`` of the key `dit` becomes ``external/dit/dit.safetensors``; a second one of that name
    ``external/dit-2/dit.safetensors``. One that caches are named after keeps the hash in that name, as
    ``external/vae-1a2b3c4d/vae.safetensors``. A rebuild has its inputs there, and caches of the same names.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], str] = {}

    def of(self, path: str, role: str, *, naming: bool = False) -> str:
        """Return the path's place; `role` is what it is used for, `naming` whether caches are named after it."""
        pure = PurePath(path)
        if not pure.is_absolute() and ".." not in pure.parts:
            return path
        if (role, path) not in self._known:
            self._known[role, path] = self._tagged(path, role) if naming else self._numbered(path, role)
        return self._known[role, path]

    def of_value(self, value: Any, role: str, *, naming: bool = False) -> Any:
        """Return the places of a setting's value: a path, several, or none."""
        if isinstance(value, list):
            return [self.of_value(one, role) for one in value]
        return self.of(value, role, naming=naming) if isinstance(value, str) and value else value

    @property
    def replaced(self) -> dict[str, str]:
        """The place of each path that leaves the working directory, by the path as written."""
        return {path: place for (_, path), place in self._known.items()}

    @staticmethod
    def _tagged(path: str, role: str) -> str:
        return f"{OUTSIDE}/{role}-{path_tag(path)}/{PurePath(path).name}"

    def _numbered(self, path: str, role: str) -> str:
        number, taken = 1, set(self._known.values())
        while (place := f"{OUTSIDE}/{role}{f'-{number}' if number > 1 else ''}/{PurePath(path).name}") in taken:
            number += 1
        return place


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A configuration, its runs, and which caches they use."""

    config: Mapping[str, Any]
    """What holds for all runs, as written."""
    runs: Mapping[str, Run]
    """By name, in their order."""
    resolved: Mapping[str, Mapping[str, Any]]
    """Each run's configuration, defaults filled in."""
    datasets: Mapping[str, str]
    """Each dataset file that runs use by its name."""
    caches: Mapping[str, Mapping[str, CacheSet]]
    """Each run's cache set, by kind."""
    prompts: Mapping[str, str]
    """The name of the texts that belong to no picture, of each run that has any."""
    home: str
    """The folder of what belongs to the whole configuration."""
    places: Places = field(default_factory=Places)

    def sets(self, kind: str) -> list[CacheSet]:
        """Return the different cache sets of a kind."""
        return list({one.name: one for one in self.caches[kind].values()}.values())

    def prompts_manifest(self, name: str) -> Path:
        """Return the manifest of these texts."""
        return Path("results/manifests", self.home, "prompts", f"{name}.tsv")

    def lora(self, run: str) -> Path:
        """Return where a run's LoRA lies."""
        config = self.resolved[run]
        return Path(os.path.join(config["output_dir"], f"{config['output_name']}.safetensors"))


def read_layout(config: Mapping[str, Any], file: str) -> Layout:
    """Return the layout of a workflow's configuration. Raises InputError for a table of runs that cannot be read."""
    runs = {safe_name(run.name, LONGEST_NAME): run for run in expand_runs(config, file)}
    shared = {key: value for key, value in config.items() if key not in (TABLE, GRID)}
    resolved = {name: resolve_config(run.config) for name, run in runs.items()}
    own = own_values(config)
    texts = cache_sets(resolved, own, TEXT_MODEL)
    return Layout(
        config=shared,
        runs=runs,
        resolved=resolved,
        datasets={dataset_name(path, own): path for path in dataset_files(resolved, own)},
        caches={"latents": cache_sets(resolved, own, LATENT_MODEL), "text_encoder_outputs": texts},
        prompts=prompt_sets(resolved, own, texts),
        home=home(own),
    )


def manifest(name: str, kind: str) -> Path:
    """Return the manifest of a cache set."""
    return Path("results/manifests", name, f"{kind}.tsv")


def trainer_toml(run: str) -> Path:
    """Return a run's filtered TOML."""
    return Path("results/train", run, "config.toml")
