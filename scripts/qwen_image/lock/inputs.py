"""The facts about what everything is made from: software, configuration, datasets, checkpoints.

A fact's value is text, or the files whose content it is: of one the SHA-256, of several the identity of the model that
they are (see models/identity.py). Nothing is remembered from earlier, and nothing is written.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen_image import __version__
from qwen_image.cache.fingerprint import LATENT_ENCODER_VERSION, PREPROCESSING_VERSION, TEXT_ENCODER_VERSION
from qwen_image.dataset.config import DatasetSettings, load_dataset_config
from qwen_image.dataset.items import Item, list_items, read_captions
from qwen_image.lock.layout import DATASET_PATHS, PATHS, Layout, Places
from qwen_image.lock.rows import CODE, CONFIG, DATASET, DEVICE, INPUT, MODEL, RUN, SETTING, SHA256, SOFTWARE, Key
from qwen_image.models.checkpoint import checkpoint_files
from qwen_image.models.tokenizer import tokenizer_files
from qwen_image.problems import InputError
from qwen_image.runs.caches import NAMING, OUTSIDE

Fact = tuple[Key, str | Path | tuple[Path, ...]]

PACKAGES = (
    "accelerate", "bitsandbytes", "diffusers", "numpy", "opencv-python-headless", "peft", "pillow", "pytorch-optimizer",
    "safetensors", "snakemake", "tokenizers", "torch", "transformers",
)  # fmt: skip
"""Those that bytes depend on."""
VECTOR_UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
"""What a CPU's sums may be ordered by, as Linux names it."""
CHECKPOINTS = ("dit", "vae", "text_encoder", "caching_teo_text_encoder")
HUB = f"{OUTSIDE}/hub"
"""The place of files that a hub's cache holds, which each machine has in its own place."""
ABSENT = "missing"
UNREADABLE = "cannot be read"


def software_facts() -> Iterator[Fact]:
    """Yield the versions of this project's code and of the packages, and what the CPU computes with."""
    yield (CODE, "qwen_image", "version"), __version__
    yield (CODE, "preprocessing", "version"), PREPROCESSING_VERSION
    yield (CODE, "latent encoder", "version"), LATENT_ENCODER_VERSION
    yield (CODE, "text encoder", "version"), TEXT_ENCODER_VERSION
    yield (SOFTWARE, "python", "version"), ".".join(platform.python_version_tuple()[:2])
    for name in PACKAGES:
        try:
            yield (SOFTWARE, name, "version"), importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield (SOFTWARE, name, "version"), "not installed"
    yield (DEVICE, "cpu", "kind"), " ".join([platform.machine(), *_vector_units()])


def config_facts(layout: Layout) -> Iterator[Fact]:
    """Yield the configuration as written: what all runs share, then each run's own keys and its place in the order."""
    for key, value in layout.config.items():
        yield (CONFIG, SETTING, key), _written(layout.places, key, value)
    for number, (name, run) in enumerate(layout.runs.items(), start=1):
        yield (f"{RUN} {name}", "order", "number"), str(number)
        # without a value, and where all runs have none, a key says nothing, and a table of runs has an empty cell
        for key in sorted(key for key in run.own if not run.config[key] is layout.config.get(key) is None):
            written = _written(layout.places, key, run.config[key], naming=key in NAMING)
            yield (f"{RUN} {name}", SETTING, key), written


def dataset_facts(layout: Layout) -> Iterator[Fact]:
    """Yield each dataset's settings, and its images and captions as they are now."""
    for name, file in layout.datasets.items():
        part = f"{DATASET} {name}"
        yield (part, "file", "place"), layout.places.of(file, "dataset_config")
        try:
            datasets = load_dataset_config(file)
        except InputError as error:
            yield (part, "file", "reading"), f"{UNREADABLE}: {error.problems[0].found}"
            continue
        for settings in datasets:
            yield from _settings_facts(part, name, settings, layout.places)
            yield from _item_facts(part, settings, layout.places)


def model_facts(layout: Layout) -> Iterator[Fact]:
    """Yield the identity of each checkpoint and adapter that a run names, and the files of it."""
    seen = set()
    for config in layout.resolved.values():
        encoder, tokenizer = config["caching_teo_text_encoder"], config["tokenizer"]
        named = [("dit", config["dit"], None), ("vae", config["vae"], None)]
        # the key by which it was named: a rebuild has it at that key's place
        encoder_key = "text_encoder" if encoder == config["text_encoder"] else "caching_teo_text_encoder"
        named.append((encoder_key, encoder, tokenizer))
        named += [("network_weights", path, None) for path in filter(None, [config.get("network_weights")])]
        named += [("base_weights", path, None) for path in config.get("base_weights") or []]
        for one in named:
            if one not in seen:
                seen.add(one)
                yield from _model(layout.places, *one)


def other_input_facts(layout: Layout) -> Iterator[Fact]:
    """Yield the files of prompts."""
    for config in layout.resolved.values():
        if path := config.get("sample_prompts"):
            yield (INPUT, layout.places.of(path, "sample_prompts"), SHA256), Path(path)


def item_name(places: Places, dataset: int, key: str) -> str:
    """Return what the lock calls an item: ``[0] tom.jpg``."""
    return f"[{dataset}] {places.of(key, 'image')}"


def caption_sha256(caption: str) -> str:
    """Return the hash of a caption as it is encoded; the same stands in the manifest."""
    return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).hexdigest()


def numbered(word: str, number: int) -> str:
    """Return ``caption`` for the first and ``caption 2`` for the second."""
    return word if number == 1 else f"{word} {number}"


def _written(places: Places, key: str, value: Any, *, naming: bool = False) -> str:
    placed = places.of_value(value, key, naming=naming) if key in PATHS else value
    return json.dumps(placed, ensure_ascii=False, sort_keys=True)


def _settings_facts(part: str, name: str, settings: DatasetSettings, places: Places) -> Iterator[Fact]:
    for key, value in asdict(settings).items():
        if key != "index" and value is not None:
            placed = places.of(value, f"{name}-{settings.index}-{key}") if key in DATASET_PATHS else value
            yield (part, f"[{settings.index}]", f"{SETTING} {key}"), json.dumps(placed, ensure_ascii=False)


def _item_facts(part: str, settings: DatasetSettings, places: Places) -> Iterator[Fact]:
    if settings.image_jsonl_file is not None:
        yield (part, f"[{settings.index}]", "JSONL file"), Path(settings.image_jsonl_file)
    try:
        listing = list_items(settings)
    except InputError as error:
        yield (part, f"[{settings.index}]", "listing"), f"{UNREADABLE}: {error.problems[0].found}"
        return
    for reject in listing.rejects:
        yield (part, item_name(places, settings.index, reject.key), "left out"), "not usable"
    for item in listing.items:
        name = item_name(places, settings.index, item.key)
        yield (part, name, "image"), Path(item.image_path)
        yield from (((part, name, what), value) for what, value in _captions(item, settings))


def _captions(item: Item, settings: DatasetSettings) -> Iterator[tuple[str, str]]:
    try:
        for number, caption in enumerate(read_captions(item, settings), start=1):
            yield numbered("caption", number), caption_sha256(caption)
    except ValueError:
        yield "caption", UNREADABLE


def _model(places: Places, key: str, path: str, tokenizer: str | None) -> Iterator[Fact]:
    place = places.of(path, key)
    role = key.removeprefix("caching_teo_") if key in CHECKPOINTS else None
    try:
        files = checkpoint_files(path, role) if role else [Path(path)]
        files += tokenizer_files(path, tokenizer) if role == "text_encoder" else []
    except (InputError, OSError):
        yield (MODEL, place, "identity"), ABSENT
        return
    # under both of a model's places where the tokenizer lies elsewhere
    folders = {Path(path): place, **({Path(tokenizer): places.of(tokenizer, "tokenizer")} if tokenizer else {})}
    for file in files:
        yield (MODEL, _within(folders, file), SHA256), file
    what = "identity" if tokenizer is None else f"identity with {places.of(tokenizer, 'tokenizer')}"
    yield (MODEL, place, what), tuple(files)


def _within(folders: Mapping[Path, str], file: Path) -> str:
    """Return a file's place, given those of the folders that it may lie in, or of itself."""
    for folder, place in folders.items():
        if file == folder:
            return place
        if file.is_relative_to(folder):
            return f"{place}/{file.relative_to(folder).as_posix()}"
    (first, place), *_ = folders.items()
    if file.is_relative_to(first.parent):  # the shards beside an index
        return (Path(place).parent / file.relative_to(first.parent)).as_posix()
    return f"{HUB}/{file.name}"  # of a tokenizer that is named by its repository


def _vector_units() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    return [unit for unit in VECTOR_UNITS if unit in flags]
