"""How a LoRA was made, kept in its own file beside the field's keys: enough to make it again from the same inputs.

Settings and datasets stand there as they were resolved, inputs by the hash of their content and by their last name. No
wall-clock time, random id, machine path or secret enters, and no setting that leaves the trained weights and the file's
form alone: where it was logged, how often it was saved.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import PurePath
from typing import TYPE_CHECKING

from qwen_image import __version__
from qwen_image.cache.fingerprint import ARITHMETIC_KEY, PARTS_KEY, read_cache_header
from qwen_image.files import is_sha256
from qwen_image.training.identity import BESIDE, INPUTS
from qwen_image.training.schema import key_schemas

if TYPE_CHECKING:
    from qwen_image.dataset.config import DatasetSettings
    from qwen_image.training.arguments import Settings
    from qwen_image.training.items import CacheFile, TrainingItem

PREFIX = "qwen_image."
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
OF_THE_FILE = ("output_name", "save_precision", "save_format", "vae", "text_encoder")
"""Settings that bear on the file, beside those that bear on the weights in it."""
PATHS = INPUTS | {"vae", "text_encoder"}
OF_AN_ITEM = ("source", "bucket", "caption", "picture")
"""Parts of a cache file's fingerprint that differ from item to item."""
DATASET_PATHS = ("image_directory", "image_jsonl_file", "control_directory", "cache_directory")


def provenance(
    settings: Settings, datasets: Sequence[DatasetSettings], origin: Mapping[str, object], item: TrainingItem
) -> dict[str, str]:
    """Return the file's own keys, each a JSON text but for the version.

    `origin` is everything that the training follows from; `item` is any of those trained on: its cache files tell which
    VAE and which text encoder made them.
    """
    if settings.no_metadata:
        return {}
    values = {
        "software": {
            "python": ".".join(platform.python_version_tuple()[:2]),
            **{name: version(name) for name in PACKAGES},
        },
        "settings": _settings(settings) | {"mixed_precision": origin["mixed_precision"]},
        "num_processes": origin["num_processes"],
        "datasets": [_dataset(dataset) for dataset in datasets],
        "inputs": {
            **{name: value for name, value in origin.items() if is_sha256(value)},
            "latents": _made_by(item.latents),
            "text_encoder_outputs": _made_by(item.texts[0]),
        },
    }
    texts = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
    return {f"{PREFIX}{key}": text for key, text in {"version": __version__, **texts}.items()}


def last_name(path: str | list[str] | None) -> str | list[str] | None:
    """Return what stands in a LoRA's file of a path, or of each of several."""
    if isinstance(path, list):
        return [last_name(one) for one in path]
    return PurePath(path).name or path if path else path


def told_settings() -> list[str]:
    """Return which settings stand in a LoRA's file; refused ones have only their default, which is no choice."""
    wanted = key_schemas().keys() - BESIDE | set(OF_THE_FILE)
    return [key for key, schema in key_schemas().items() if key in wanted and "x-refused" not in schema]


def _settings(settings: Settings) -> dict[str, object]:
    values = settings.as_dict()
    return {key: last_name(values[key]) if key in PATHS else values[key] for key in told_settings()}


def _dataset(dataset: DatasetSettings) -> dict[str, object]:
    return {
        key: last_name(value) if key in DATASET_PATHS else value
        for key, value in asdict(dataset).items()
        if value is not None and key != "index"
    }


def _made_by(file: CacheFile) -> dict[str, str]:
    """What made a cache file, as its header tells: the model's hash, the version of the code, its settings, and how."""
    header = read_cache_header(file.path)
    metadata = header.metadata if header is not None else {}
    parts = json.loads(metadata.get(PARTS_KEY, "{}"))
    made_by = {key: value for key, value in parts.items() if key not in OF_AN_ITEM}
    return made_by | {key: value for key, value in metadata.items() if key == ARITHMETIC_KEY}
