"""What must stand in an empty folder so that snakemake makes there again what a lock describes.

The configuration and the dataset files are written from the lock; images, captions and checkpoints are linked, each by
itself, so that a cache that lies among the images is not found there and nothing is written among them.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from qwen_image.config import value_schema
from qwen_image.files import atomic_write
from qwen_image.lock.dataset_file import dataset_file_text
from qwen_image.lock.inputs import HUB
from qwen_image.lock.rows import CONFIG, DATASET, DEVICE, MODEL, RUN, SETTING, SHA256, Key, parts_of, settings_of
from qwen_image.problems import InputError, Problem
from qwen_image.runs.keys import TABLE
from qwen_image.training.schema import key_types

CONFIG_FILE, RUNS_FILE = "rebuild.yaml", "rebuild.runs.tsv"
INPUT_PATHS = (
    "dit", "vae", "text_encoder", "caching_teo_text_encoder", "tokenizer", "network_weights", "base_weights",
    "sample_prompts", "log_tracker_config",
)  # fmt: skip
"""Keys that name what is read."""
OUTPUT_PATHS = ("output_dir", "logging_dir")
"""Keys that name where something is made."""
STAGES = ("cache_latents", "cache_text_encoder_outputs", "cache_prompts", "train")


@dataclass(frozen=True)
class Plan:
    """A folder to be."""

    files: Mapping[str, str]
    """What is written: text by place."""
    links: Mapping[str, Path]
    """What is linked: sources by place."""

    def make(self, folder: Path) -> None:
        """Make the folder. Raises InputError when it holds anything, or a source is not there."""
        problems = [
            Problem(file=place, found=f"{source} is not there", mend=f"name it: --input {place}=PATH")
            for place, source in self.links.items()
            if not source.exists()
        ]
        if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
            found, mend = "is there already, and not empty", "name a new folder: what is made is to come from nothing"
            problems.append(Problem(file=str(folder), found=found, mend=mend))
        if problems:
            raise InputError(problems)
        for place, text in self.files.items():
            atomic_write(folder / place, text.encode("utf-8", "surrogateescape"))
        for place, source in self.links.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).symlink_to(source.absolute())


class Sources:
    """Where the inputs of a lock are now: at their places within a folder, or where the user says."""

    def __init__(self, root: Path, given: Mapping[str, Path]) -> None:
        self._root = root
        self._given = {PurePosixPath(place): path for place, path in given.items()}

    def of(self, place: str) -> Path:
        """Return where the file or folder of this place is. A place that was given stands for all within it."""
        pure = PurePosixPath(place)
        for outer in (pure, *pure.parents):
            if outer in self._given:
                return self._given[outer] / pure.relative_to(outer)
        # the shards beside an index that was given
        beside = next((path.parent for one, path in self._given.items() if one.parent == pure.parent), None)
        return beside / pure.name if beside is not None and not (self._root / place).exists() else self._root / place


def plan_from_lock(rows: Mapping[Key, str], sources: Sources, how: Mapping[str, Any]) -> Plan:
    """Return the plan. `how` are settings of the way things are made that replace the locked ones.

    Raises InputError for a lock that leads out of the folder.
    """
    config = {key: json.loads(value) for key, value in settings_of(rows, CONFIG).items()} | how
    own = {
        run: {key: json.loads(value) for key, value in settings_of(rows, f"{RUN} {run}").items()}
        for run in sorted(parts_of(rows, RUN), key=lambda run: int(rows[f"{RUN} {run}", "order", "number"]))
    }
    files = {}
    if any(own.values()):
        files[RUNS_FILE] = _runs_table(list(own.values()))
    files[CONFIG_FILE] = yaml.safe_dump(config | ({TABLE: RUNS_FILE} if files else {}), allow_unicode=True)
    places = [place for one in (config, *own.values()) for key in INPUT_PATHS for place in _several(one.get(key))]
    for name in parts_of(rows, DATASET):
        datasets = _datasets(rows, f"{DATASET} {name}")
        files[rows[f"{DATASET} {name}", "file", "place"]] = dataset_file_text(
            rows[f"{DATASET} {name}", "file", "place"], list(datasets.values())
        )
        places += _item_places(rows, f"{DATASET} {name}", datasets)
    repositories = {
        one["tokenizer"] for one in (config, *own.values()) if _is_repository(one.get("tokenizer"), sources)
    }
    links = {place: sources.of(place) for place in places if place not in repositories}
    links |= {
        place: sources.of(place)
        for part, place, what in rows
        if part == MODEL and what == SHA256 and not _within(place, links) and not place.startswith(f"{HUB}/")
    }
    _check_places([*files, *links, *_made(rows, [config, *own.values()], how)])
    return Plan(files, links)


def threads(rows: Mapping[Key, str]) -> dict[str, int]:
    """Return how many threads the jobs of each stage had, where the lock knows, and they computed on a CPU."""
    found: dict[str, set[int]] = {}
    for (part, name, _), value in rows.items():
        stage = name.partition(" ")[0]
        if part == DEVICE and stage in STAGES and (match := re.fullmatch(r"cpu, (\d+) threads?", value)):
            found.setdefault(stage, set()).add(int(match[1]))
    processes = json.loads(settings_of(rows, CONFIG).get("num_processes", "1"))
    counts = {stage: numbers.pop() for stage, numbers in sorted(found.items()) if len(numbers) == 1}
    # of the whole job, which each process has a share of
    return {stage: count * (processes if stage == "train" else 1) for stage, count in counts.items()}


def _runs_table(runs: list[Mapping[str, Any]]) -> str:
    """The table of runs, as runs/table.py reads it."""
    text = io.StringIO()
    table = csv.DictWriter(text, sorted({key for run in runs for key in run}), delimiter="\t", lineterminator="\n")
    table.writeheader()
    table.writerows({key: _cell(key, value) for key, value in run.items()} for run in runs)
    return text.getvalue()


def _cell(key: str, value: Any) -> str:
    if isinstance(value, str) and set(key_types(value_schema(key))) <= {"string", "null"}:
        return value
    return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**9).strip()[1:-1]


def _several(value: Any) -> list[str]:
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str) and one]


def _datasets(rows: Mapping[Key, str], part: str) -> dict[int, dict[str, Any]]:
    """The settings of a dataset file's datasets, by index."""
    datasets: dict[int, dict[str, Any]] = {}
    for (one, name, what), value in sorted(rows.items()):
        if one == part and what.startswith(f"{SETTING} "):
            datasets.setdefault(int(name.strip("[]")), {})[what.removeprefix(f"{SETTING} ")] = json.loads(value)
    return dict(sorted(datasets.items()))


def _item_places(rows: Mapping[Key, str], part: str, datasets: Mapping[int, Mapping[str, Any]]) -> Iterator[str]:
    for settings in datasets.values():
        yield from _several(settings.get("image_jsonl_file"))
    for one, name, what in rows:
        match = re.match(r"\[(\d+)\] ", name)
        if one != part or match is None or what not in ("image", "left out"):
            continue
        settings, key = datasets[int(match[1])], name[match.end() :]
        if (folder := settings.get("image_directory")) is None:
            yield key
        elif what == "image":
            yield os.path.join(folder, key)
            yield os.path.join(folder, os.path.splitext(key)[0] + settings["caption_extension"])


def _made(rows: Mapping[Key, str], configs: list[Mapping[str, Any]], how: Mapping[str, Any]) -> Iterator[str]:
    """The folders in which the workflow will write, as far as the lock names them."""
    for config in configs:
        for key in {*OUTPUT_PATHS} - how.keys():
            yield from _several(config.get(key))
    for part in parts_of(rows, DATASET):
        for settings in _datasets(rows, f"{DATASET} {part}").values():
            yield from _several(settings.get("cache_directory"))


def _within(place: str, links: Mapping[str, Path]) -> bool:
    return any(str(outer) in links for outer in (PurePosixPath(place), *PurePosixPath(place).parents))


def _is_repository(tokenizer: str | None, sources: Sources) -> bool:
    """Whether a tokenizer is named by its repository, which each machine has in its own place."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", tokenizer or "") is not None and not sources.of(tokenizer).exists()


def _check_places(places: list[str]) -> None:
    """Nothing is written or linked outside of the folder, whoever wrote the lock."""
    outside = [place for place in places if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts]
    if outside:
        mend = "take the lock from where it was made"
        raise InputError([Problem(file=place, found="leads out of the folder", mend=mend) for place in outside])
