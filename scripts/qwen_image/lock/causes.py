"""Why a made file is another than the locked one: what it says of its own making, against what was locked of that."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qwen_image.cache.fingerprint import read_cache_header
from qwen_image.lock.inventory import Inventory
from qwen_image.lock.outputs import fingerprint_parts
from qwen_image.lock.rows import CODE, CONFIG, DATASET, DEVICE, SETTING, SOFTWARE, Key

INPUT_CHANGED = "input changed"
MODEL_CHANGED = "model changed"
PACKAGES_CHANGED = "code changed"
SETTINGS_CHANGED = "settings changed"
DAMAGED = "file damaged"
HOW = frozenset({
    "caching_latent_device", "caching_latent_batch_size", "caching_latent_num_workers", "caching_latent_skip_existing",
    "caching_latent_keep_cache", "caching_teo_device", "caching_teo_batch_size", "caching_teo_num_workers",
    "caching_teo_skip_existing", "caching_teo_keep_cache", "caching_shards", "on_bad_item", "gpu_ids",
    "main_process_port", "num_cpu_threads_per_process", "logging_dir",
})  # fmt: skip
"""Keys that say how the work is done. What comes of it is compared itself, so they alone make no difference."""
VERSIONS = ("encoder", "preprocessing")
"""Parts of a fingerprint that are versions of this project's code."""


@dataclass(frozen=True)
class Comparison:
    """A lock beside what is there."""

    locked: Mapping[Key, str]
    found: Inventory

    @functools.cached_property
    def changed(self) -> list[Key]:
        """Return the places of facts that differ, are new or are gone."""
        keys = self.locked.keys() | self.found.rows.keys()
        return [key for key in keys if self.locked.get(key) != self.found.rows.get(key)]

    def differ(self, keys: Iterable[Key]) -> list[Key]:
        """Return those of the places whose facts differ."""
        return [key for key in keys if self.locked.get(key) != self.found.rows.get(key)]

    def names_there(self, part: str, name: str) -> tuple[bool, bool]:
        """Return whether the lock, and what is there, know anything of this name."""
        return tuple((part, name) in names for names in self._names)

    def told(self, part: str, name: str) -> Mapping[str, str]:
        """Return what the lock knows of this name."""
        return self._locked_names.get((part, name), {})

    @functools.cached_property
    def dataset_parts(self) -> set[str]:
        """The lock's datasets."""
        return {part for part, _, _ in self.locked if part.startswith(f"{DATASET} ")}

    @functools.cached_property
    def _locked_names(self) -> dict[tuple[str, str], dict[str, str]]:
        names: dict[tuple[str, str], dict[str, str]] = {}
        for (part, name, what), value in self.locked.items():
            names.setdefault((part, name), {})[what] = value
        return names

    @functools.cached_property
    def _names(self) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
        """Parts and names that the lock, and what is there, know anything of."""
        return set(self._locked_names), {key[:2] for key in self.found.rows}

    def otherwise(self, stage: str) -> str:
        """Return what of the way things are made is another than it was, in words; empty where nothing is."""
        return "; ".join(
            f"{key[2] if key[1] == SETTING else key[1]}: {self.both(key)}"
            for key in sorted(self.changed)
            if key[0] in (SOFTWARE, CODE)
            or (key[0] == DEVICE and key[1] in ("cpu", stage))
            or (key[0] == CONFIG and key[2] in HOW)
        )

    def both(self, key: Key) -> str:
        """Return what was locked at a place and what is there, in words."""
        return f"locked {self.locked.get(key, 'nothing')}, now {self.found.rows.get(key, 'nothing')}"


def cache_file_cause(comparison: Comparison, key: Key) -> str:
    """Return why a cache file is another."""
    part, name, what = key
    _, _, rest = part.partition(" ")
    dataset_and_variant, _, kind = rest.rpartition(" ")
    path = comparison.found.files[key]
    parts = fingerprint_parts(path)
    if path in comparison.found.damaged:
        return f"{DAMAGED}: its values are not those that its own header names"
    if parts is None:
        return f"{DAMAGED}: it is no whole cache file of this project"
    locked = comparison.locked
    causes = []
    if kind == "latents":
        dataset = _dataset_part(comparison, dataset_and_variant)
        causes += _other(locked.get((dataset, name, "image")), parts.get("source"), INPUT_CHANGED)
        causes += _other(locked.get((part, name, "bucket")), parts.get("bucket"), SETTINGS_CHANGED)
    elif kind == "text_encoder_outputs":
        dataset = _dataset_part(comparison, dataset_and_variant)
        caption = what.replace("sha256", "caption").replace("of ", "")
        causes += _other(locked.get((dataset, name, caption)), parts.get("caption"), INPUT_CHANGED)
    made_by = comparison.told(part, f"{name.partition(' ')[0]} made by")
    for word, value in made_by.items():
        reason = MODEL_CHANGED if word == "model" else PACKAGES_CHANGED if word in VERSIONS else SETTINGS_CHANGED
        causes += _other(value, parts.get(word), reason)
    if causes:
        return f"made from something else ({', '.join(dict.fromkeys(causes))})"
    return _same_origin(comparison, f"cache_{kind} {dataset_and_variant}")


def manifest_cause(comparison: Comparison, key: Key) -> str:
    """Return why a manifest, its digest or its table of rejects is another."""
    part, name, _ = key
    path, now = comparison.found.files[key], comparison.found.rows[key]
    digest = path.with_suffix(".sha256")
    if name == "manifest" and digest.is_file() and digest.read_text(errors="replace").strip() != now:
        return f"{DAMAGED}: it was changed after it was written"
    items = {one[1] for one in comparison.changed if one[0] == part and one[1].startswith("[")}
    if items:
        return f"follows from {len(items)} items whose rows or files differ"
    dataset = _dataset_part(comparison, part.partition(" ")[2].rpartition(" ")[0])
    if any(one[0] == dataset for one in comparison.changed):
        return "follows from changes in the dataset"
    return f"{DAMAGED}, or edited"


def toml_cause(comparison: Comparison, key: Key) -> str:
    """Return why a trainer's TOML is another."""
    changed = [one for one in comparison.changed if one[1] == SETTING and one[0] in (CONFIG, key[0])]
    keys = ", ".join(sorted({one[2] for one in changed}))
    return f"follows from changed settings ({keys})" if changed else f"{DAMAGED}, or edited"


def lora_cause(comparison: Comparison, key: Key) -> str:
    """Return why a LoRA is another."""
    part = key[0]
    path = comparison.found.files[key]
    if read_cache_header(path) is None:
        return f"{DAMAGED}: it is no whole safetensors file"
    if path in comparison.found.damaged:
        return f"{DAMAGED}: its weights are not those that its own header names"
    causes = []
    for name, reason in (
        ("lora made from", "inputs"), ("lora made with", "settings"), ("lora made by", "versions of packages"),
    ):  # fmt: skip
        keys = {one for one in {**comparison.locked, **comparison.found.rows} if one[:2] == (part, name)}
        if differing := comparison.differ(keys):
            causes.append(f"{reason}: {', '.join(sorted(one[2] for one in differing))}")
    if causes:
        return f"made from something else ({'; '.join(causes)})"
    return _same_origin(comparison, f"train {part.partition(' ')[2]}")


def _same_origin(comparison: Comparison, stage: str) -> str:
    if other := comparison.otherwise(stage):
        return f"{DAMAGED}, or made again from the same in another way ({other})"
    return f"{DAMAGED}: it was made from the same as the locked one, and its bytes are others"


def _other(locked: str | None, now: str | None, reason: str) -> list[str]:
    return [] if locked is None or locked == now else [reason]


def _dataset_part(comparison: Comparison, name: str) -> str:
    """The part of the dataset that a cache set is of: the set is named after it, and what differs behind a dot."""
    own = [part for part in comparison.dataset_parts if f"{DATASET} {name}.".startswith(f"{part}.")]
    return max(own, key=len, default=f"{DATASET} {name}")
