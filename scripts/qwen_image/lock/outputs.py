"""The facts about what was made: cache files and their manifests, trainers' TOMLs, LoRAs, and on which devices.

What a cache file or a LoRA says of itself stands in its own header; locked beside its hash, it tells later why another
is there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from qwen_image.bounded import parse_json, read_bytes
from qwen_image.cache.fingerprint import PARTS_KEY, read_cache_header
from qwen_image.cache.manifest import LATENT_COLUMNS, TEXT_COLUMNS, read_manifest
from qwen_image.cache.names import split_text_file_name
from qwen_image.cache.prompts import prompts_folder
from qwen_image.container import Header
from qwen_image.dataset.config import load_dataset_config
from qwen_image.lock.inputs import Fact, item_name, numbered
from qwen_image.lock.layout import KINDS, PATHS, Layout, Places, manifest, trainer_toml
from qwen_image.lock.rows import CACHE, DEVICE, RUN, SHA256
from qwen_image.lock.settings import AWAY, OF_A_REBUILD
from qwen_image.problems import InputError
from qwen_image.runs.caches import CacheSet
from qwen_image.training.provenance import OF_AN_ITEM, PREFIX

COLUMNS = {"latents": LATENT_COLUMNS, "text_encoder_outputs": TEXT_COLUMNS}
KEPT = {"latents": "caching_latent_keep_cache", "text_encoder_outputs": "caching_teo_keep_cache"}
"""The key that says whether a kind's cache outlives the trainings."""
SOURCE_DATE_EPOCH = "SOURCE_DATE_EPOCH"
"""The variable that a LoRA's time keys follow from, where it was set."""
LOGS = Path("results/logs")
COMPUTED_ON = re.compile(r"computed on (.+)")
"""What a stage's log says of its device; see device.py."""


def cache_facts(layout: Layout) -> Iterator[Fact]:
    """Yield the hashes of each cache set's manifest, of what lies beside it, and of the cache files that it lists."""
    for kind in KINDS:
        for one in layout.sets(kind):
            if one.config[KEPT[kind]]:
                yield from _set_facts(layout.places, one, kind)
            yield from _device_facts(
                f"cache_{kind} {one.name}", sorted((LOGS / f"cache_{kind}" / one.name).glob("*.log"))
            )
    for name in sorted(set(layout.prompts.values())):
        yield from _prompt_facts(f"{CACHE} {name} prompts", layout.prompts_manifest(name))
        yield from _device_facts(f"cache_prompts {name}", [LOGS / "cache_prompts" / f"{name}.log"])


def run_facts(layout: Layout) -> Iterator[Fact]:
    """Yield of each run the hashes of its TOML and its LoRA, and what the LoRA's header says it was made from."""
    for run in layout.runs:
        part = f"{RUN} {run}"
        yield from (((part, "config.toml", what), value) for what, value in _toml(layout.places, trainer_toml(run)))
        lora = layout.lora(run)
        yield (part, "lora", SHA256), lora
        if layout.resolved[run].get("save_format") == "both":
            yield (part, "lora in diffusers' names", SHA256), lora.with_suffix(".diffusers.safetensors")
        header = read_cache_header(lora)
        if header is not None:
            yield from (((part, *key), value) for key, value in provenance(header))
        yield from _device_facts(f"train {run}", [LOGS / "train" / f"{run}.log"])


def _set_facts(places: Places, one: CacheSet, kind: str) -> Iterator[Fact]:
    part, path = f"{CACHE} {one.name} {kind}", manifest(one.name, kind)
    yield (part, "manifest", SHA256), path
    yield (part, "digest", SHA256), path.with_suffix(".sha256")
    yield (part, "rejects", SHA256), path.with_suffix(".rejects.tsv")
    try:
        rows = read_manifest(path, COLUMNS[kind], checked=False).to_dict("records")
        folders = {one.index: Path(one.cache_directory) for one in load_dataset_config(one.dataset_config)}
    except InputError:
        return  # they are told by themselves, or by the facts of the datasets
    ways, explained = set(), set()
    for row in rows:
        if row["dataset"] not in folders:
            continue
        file, name = folders[row["dataset"]] / row["cache_file"], item_name(places, row["dataset"], row["key"])
        named = split_text_file_name(row["cache_file"])
        yield (part, name, numbered(SHA256, named[1] if named else 1)), file
        if "bucket_width" in row:
            yield (part, name, "bucket"), f"{row['bucket_width']}x{row['bucket_height']}"
        ways.add(row["arithmetic"])
        if row["dataset"] not in explained and (parts := fingerprint_parts(file)) is not None:
            explained.add(row["dataset"])
            made_by = {key: value for key, value in parts.items() if key not in OF_AN_ITEM}
            yield from (((part, f"[{row['dataset']}] made by", key), value) for key, value in made_by.items())
    yield (part, "arithmetic", "kinds"), ", ".join(sorted(ways))


def _prompt_facts(part: str, path: Path) -> Iterator[Fact]:
    yield (part, "manifest", SHA256), path
    try:
        rows = read_manifest(path, TEXT_COLUMNS, checked=False).to_dict("records")
    except InputError:
        return
    yield from (((part, row["key"], SHA256), prompts_folder(path) / row["cache_file"]) for row in rows)


def fingerprint_parts(file: Path) -> dict[str, str] | None:
    """Return what a cache file says it was made from; None where it is not there, not whole, or says nothing."""
    header = read_cache_header(file)
    try:
        parts = parse_json(header.metadata[PARTS_KEY]) if header is not None else None
    except (KeyError, ValueError):
        return None
    return {_sound(str(key)): _sound(str(value)) for key, value in parts.items()} if isinstance(parts, dict) else None


def _toml(places: Places, path: Path) -> Iterator[tuple[str, str | Path]]:
    """The file, or the hash that it has with the paths' places in it; without paths that leave the folder the same.

    Where it holds settings that a rebuild goes without, also the hash that it has without them.
    """
    try:
        lines = read_bytes(path).decode("utf-8", "surrogateescape").split("\n")
    except (OSError, ValueError):
        yield SHA256, path
        return
    placed = [_placed_line(places, line) for line in lines]
    yield SHA256, path if placed == lines else _lines_sha256(placed)
    kept = [line for line in placed if line.partition(" = ")[0] not in AWAY]
    if kept != placed:
        yield OF_A_REBUILD, _lines_sha256(kept)


def _placed_line(places: Places, line: str) -> str:
    """A line `key = value`; the value may be a list of texts. A line that somebody has broken stays as it is."""
    key, _, value = line.partition(" = ")
    if key not in PATHS:
        return line

    def placed(match: re.Match[str]) -> str:
        return json.dumps(places.of(json.loads(match[0]), key), ensure_ascii=False)

    try:
        value = re.sub(r'"(?:[^"\\]|\\.)*"', placed, value)
        value.encode("utf-8", "surrogateescape")
    except ValueError:
        return line
    return f"{key} = {value}"


def _lines_sha256(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def provenance(header: Header) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield what a LoRA says of its making (see training/provenance.py), in the lock's words."""
    if (moment := header.metadata.get("ss_training_started_at")) is not None:
        yield ("lora made with", SOURCE_DATE_EPOCH), _sound(moment.removesuffix(".0"))
    for group, name in (("settings", "lora made with"), ("inputs", "lora made from"), ("software", "lora made by")):
        try:
            values = parse_json(header.metadata.get(f"{PREFIX}{group}", "{}"))
        except ValueError:
            continue
        for key, value in values.items() if isinstance(values, dict) else ():
            nested = (
                {f"{key} {inner}": one for inner, one in value.items()} if isinstance(value, dict) else {key: value}
            )
            for what, one in nested.items():
                yield (name, _sound(what)), _sound(one if isinstance(one, str) else json.dumps(one, ensure_ascii=False))


def _sound(text: str) -> str:
    """The text of a header as a lock can hold it."""
    return text.encode("utf-8", "backslashreplace").decode()


def _device_facts(stage: str, logs: list[Path]) -> Iterator[Fact]:
    """On what the stage computed when it last did, as its logs tell; nothing where they do not."""
    found = set()
    for log in logs:
        if log.is_file():
            found.update(COMPUTED_ON.findall(log.read_text(encoding="utf-8", errors="replace")))
    if found:
        yield (DEVICE, stage, "computed on"), "; ".join(sorted(found))
