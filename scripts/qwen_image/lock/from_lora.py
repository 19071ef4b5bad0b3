"""What a LoRA's own metadata tells of its making (training/provenance.py), as facts of a lock.

It is less than a lock: images and captions are known by the manifests' hashes alone, and the threads not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from qwen_image.bounded import parse_json, text_fault
from qwen_image.cache.fingerprint import ARITHMETIC_KEY, DETERMINISTIC, read_cache_header
from qwen_image.dataset.config import DatasetSettings
from qwen_image.dataset.items import list_items
from qwen_image.dataset.keys import KEYS
from qwen_image.files import safe_name, sha256_file
from qwen_image.lock.datasets import settings_fault
from qwen_image.lock.outputs import provenance
from qwen_image.lock.rows import CONFIG, DATASET, MODEL, RUN, SETTING, SHA256, Rows
from qwen_image.problems import InputError, Problem
from qwen_image.runs.caches import OUTSIDE
from qwen_image.runs.keys import LONGEST_NAME
from qwen_image.training.identity import INPUTS
from qwen_image.training.provenance import PREFIX, told_settings
from qwen_image.training.schema import with_defaults

OUTPUT_DIR = "results/models"
MODELS = {"dit": "dit", "vae": "latents model", "text_encoder": "text_encoder_outputs model"}
"""What a LoRA was made from, by the key that names the checkpoint."""


def rows_of_lora(lora: Path, models: Mapping[str, Path]) -> Rows:
    """Return the facts. `models` are the checkpoints by key, `tokenizer` among them where it lies by itself.

    Raises InputError for a file that does not tell how it was made.
    """
    header = read_cache_header(lora)
    try:
        told = {key: parse_json(header.metadata[f"{PREFIX}{key}"]) for key in ("settings", "datasets", "num_processes")}
        settings = told["settings"]
        part = f"{RUN} {safe_name(settings['output_name'], LONGEST_NAME)}"
        rows = {(part, *key): value for key, value in provenance(header)}
        rows[part, "lora", SHA256] = sha256_file(lora)
        rows[part, "order", "number"] = "1"
        made_from = {key[2]: value for key, value in rows.items() if key[1] == "lora made from"}
        config = _config(settings, models) | {"num_processes": told["num_processes"]}
        config["caching_teo_fp8_vl"] = made_from["text_encoder_outputs weights"] == "float8_e4m3fn"
        config["deterministic"] = made_from.get(f"text_encoder_outputs {ARITHMETIC_KEY}") == DETERMINISTIC
        rows |= {(CONFIG, SETTING, key): json.dumps(value, ensure_ascii=False) for key, value in config.items()}
        for key, name in MODELS.items():
            apart = key == "text_encoder" and "tokenizer" in config
            rows[MODEL, config[key], f"identity with {config['tokenizer']}" if apart else "identity"] = made_from[name]
        rows |= _dataset_rows(settings["dataset_config"], told["datasets"])
        if faults := [fault for key, value in rows.items() for text in (*key, value) if (fault := text_fault(text))]:
            raise ValueError(f"a text of it {faults[0]}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        found = f"does not tell how it was made ({type(error).__name__}: {error})"
        mend = "take a LoRA that this project trained, without no_metadata; or rebuild from its lock"
        raise InputError([Problem(file=str(lora), found=found, mend=mend)]) from error
    return rows


def known_images(rows: Rows, folders: Sequence[Path]) -> Rows:
    """Return the facts that these folders, one a dataset, hold images. Raises InputError where they cannot be all."""
    (part,) = {part for part, _, _ in rows if part.startswith(f"{DATASET} ")}
    wanted = {key[1] for key in rows if key[0] == part and key[2] == f"{SETTING} image_directory"}
    if len(folders) != len(wanted):
        found = f"{len(folders)} given, the LoRA was trained on {len(wanted)} folders"
        mend = "give each dataset's folder, in their order"
        raise InputError([Problem(file="command line", key="--images", found=found, mend=mend)])
    images = {}
    for index, folder in enumerate(folders):
        key = (part, f"[{index}]", f"{SETTING} caption_extension")
        for item in list_items(_settings(index, str(folder), json.loads(rows[key]))).items:
            images[part, f"[{index}] {item.key}", "image"] = "not known"
    return images


def _config(settings: Mapping[str, Any], models: Mapping[str, Path]) -> dict[str, Any]:
    """The configuration: what the LoRA tells and is no default, with checkpoints where the rebuild has them."""
    if strange := sorted(settings.keys() - {*told_settings(), "mixed_precision"}):
        raise ValueError(f"{strange[0]} is no setting that a LoRA tells")
    defaults = with_defaults({})
    told = {
        key: value
        for key, value in settings.items()
        if value is not None and key not in INPUTS and (key == "mixed_precision" or value != defaults[key])
    }
    names = {key: _last_name(settings.get(key) or path.absolute().name) for key, path in models.items()}
    places = {key: f"{OUTSIDE}/{key}/{name}" for key, name in names.items()}
    for key in ("network_weights", "base_weights"):
        if value := settings.get(key):
            several = [value] if isinstance(value, str) else value
            of_several = [f"{OUTSIDE}/{key}/{_last_name(name)}" for name in several]
            places[key] = of_several if isinstance(value, list) else of_several[0]
    return told | places | {"dataset_config": settings["dataset_config"], "output_dir": OUTPUT_DIR}


def _dataset_rows(file: str, datasets: Sequence[Mapping[str, Any]]) -> Rows:
    part = f"{DATASET} {safe_name(PurePath(file).stem)}"
    rows = {(part, "file", "place"): file}
    for index, told in enumerate(datasets):
        if "image_jsonl_file" in told:
            raise ValueError("a LoRA does not name the images of a JSONL file")
        placed = {
            "image_directory": f"{OUTSIDE}/images-{index}/{_last_name(told['image_directory'])}",
            "cache_directory": f"results/cache/{index}/{_last_name(told['cache_directory'])}",
        }
        if (fault := settings_fault({**told, **placed})) is not None:
            raise ValueError(f"datasets[{index}].{fault[0]}: {fault[1]}")
        for key, value in {**told, **placed}.items():
            rows[part, f"[{index}]", f"{SETTING} {key}"] = json.dumps(value, ensure_ascii=False)
    return rows


def _last_name(name: object) -> str:
    """The name, if it is one of a file or folder and leads nowhere else."""
    if not isinstance(name, str) or PurePath(name).name != name or name == "..":
        raise ValueError(f"{name!r} is not the last name of a path")
    return name


def _settings(index: int, folder: str, caption_extension: str) -> DatasetSettings:
    """A dataset that has nothing but a folder to be listed."""
    defaults = {name: key.default for name, key in KEYS.items() if not key.ignored}
    own = {"index": index, "image_directory": folder, "cache_directory": folder, "caption_extension": caption_extension}
    return DatasetSettings(**defaults | own)
