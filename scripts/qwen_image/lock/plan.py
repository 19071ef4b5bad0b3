"""What must stand in an empty folder so that snakemake makes there again what a lock describes.

The configuration and the dataset files are written from the lock; images, captions and checkpoints are linked, each by
itself, so that a cache that lies among the images is not found there and nothing is written among them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from qwen_image.files import atomic_write, safe_name
from qwen_image.lock.dataset_file import dataset_file_text
from qwen_image.lock.datasets import LockedFile, locked_files
from qwen_image.lock.inputs import HUB
from qwen_image.lock.layout import DATASET_PATHS
from qwen_image.lock.places import Written, check_within, links_of
from qwen_image.lock.rows import CONFIG, DEVICE, MODEL, RUN, SETTING, SHA256, Key, Source, settings_of
from qwen_image.lock.runs_table import misread, runs_table
from qwen_image.lock.settings import LockedSettings, locked_settings
from qwen_image.problems import InputError, Problem
from qwen_image.runs.keys import TABLE

CONFIG_FILE, RUNS_FILE, LOCK = "rebuild.yaml", "rebuild.runs.tsv", "rebuild.lock"
"""The configuration, the table of its runs, and what it is compared with."""
INPUT_PATHS = (
    "dit", "vae", "text_encoder", "caching_teo_text_encoder", "tokenizer", "network_weights", "base_weights",
    "sample_prompts",
)  # fmt: skip
"""Keys that name what is read."""
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
            if not os.path.lexists(source)
        ]
        if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
            found, mend = "is there already, and not empty", "name a new folder: what is made is to come from nothing"
            problems.append(Problem(file=str(folder), found=found, mend=mend))
        if problems:
            raise InputError(problems)
        try:
            for place, text in self.files.items():
                atomic_write(folder / place, text.encode("utf-8", "surrogateescape"))
            for place, source in self.links.items():
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                (folder / place).symlink_to(source.absolute())
        except OSError as error:
            found = f"cannot be made: {error.filename2 or error.filename}: {error.strerror}"
            mend = "mend that, remove what is there of it, and rebuild again"
            raise InputError([Problem(file=str(folder), found=found, mend=mend)]) from error


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
        here = self._root / place
        return here if beside is None or os.path.exists(here) else beside / pure.name


def plan_from_lock(
    rows: Mapping[Key, str],
    sources: Sources,
    how: Mapping[str, Any],
    *,
    allowed: Collection[str] = (),
    source: Source | None = None,
) -> Plan:
    """Return the plan. `how` are settings of the way things are made that replace the locked ones.

    `allowed` are paths of classes that the user trusts; `source` is what the facts are called in messages. Raises
    InputError for what is no lock of this workflow, or leads out of the folder, or would run anybody's code.
    """
    source = source or Source()
    settings = locked_settings(rows, source, how, allowed)
    files = locked_files(rows, source)
    texts = {CONFIG_FILE: _config_text(settings, source)}
    if any(settings.runs.values()):
        texts[RUNS_FILE] = runs_table(settings.runs)
    texts |= {one.place: dataset_file_text(one.place, one.datasets) for one in files}
    check_within(_named(rows, settings, files), source)
    _check_dataset_configs(settings, files, source)
    output_dirs = {one["output_dir"] for one in settings.whole}
    written = Written(
        files=[CONFIG_FILE, RUNS_FILE, LOCK, *(one.place for one in files)],
        folders=[*output_dirs, *_caches(files), "results", ".snakemake"],
        caches=_caches(files),
        datasets=[safe_name(PurePosixPath(one.place).stem) for one in files],
    )
    found = {place: sources.of(place) for place in _inputs(rows, settings, files, sources)}
    found |= {place: path for place, path in _left_out(files, sources) if os.path.lexists(path)}
    return Plan(texts, links_of(found, written, source))


def threads(rows: Mapping[Key, str]) -> dict[str, int]:
    """Return how many threads the jobs of each stage had, where the lock knows, and they computed on a CPU."""
    found: dict[str, set[int]] = {}
    for (part, name, _), value in rows.items():
        stage = name.partition(" ")[0]
        if part == DEVICE and stage in STAGES and (match := re.fullmatch(r"cpu, ([0-9]{1,6}) threads?", value)):
            found.setdefault(stage, set()).add(int(match[1]))
    text = settings_of(rows, CONFIG).get("num_processes", "1")
    processes = int(text) if re.fullmatch(r"[0-9]{1,6}", text) else 1
    counts = {stage: numbers.pop() for stage, numbers in sorted(found.items()) if len(numbers) == 1}
    # of the whole job, which each process has a share of
    return {stage: count * (processes if stage == "train" else 1) for stage, count in counts.items()}


def _config_text(settings: LockedSettings, source: Source) -> str:
    shared = dict(settings.shared)
    if any(settings.runs.values()):
        shared[TABLE] = RUNS_FILE
        wrong = [
            source.problem((f"{RUN} {run}", SETTING, key), found)
            for run, key, found in misread(settings.shared, settings.runs)
        ]
        if wrong:
            raise InputError(wrong)
    return yaml.safe_dump(shared, allow_unicode=True)


def _check_dataset_configs(settings: LockedSettings, files: list[LockedFile], source: Source) -> None:
    """Every run's dataset file must be one that the lock describes: another one could name any folder."""
    places = {one.place for one in files}
    strange = dict.fromkeys(one["dataset_config"] for one in settings.whole if one["dataset_config"] not in places)
    if strange:
        found, mend = "is not described there", "take it anew from where it was made"
        raise InputError([Problem(file=source.file, key=place, found=found, mend=mend) for place in strange])


def _named(rows: Mapping[Key, str], settings: LockedSettings, files: list[LockedFile]) -> Iterator[str]:
    """All places that anything is said of."""
    for config in (settings.shared, *settings.whole):
        yield from (
            place for key in (*INPUT_PATHS, "output_dir", "dataset_config") for place in _several(config.get(key))
        )
    yield from (place for part, place, _ in rows if part == MODEL)
    for one in files:
        yield from (one.place, *one.wanted, *one.left_out)
        for dataset in one.datasets:
            yield from (dataset[key] for key in DATASET_PATHS if key in dataset)


def _inputs(
    rows: Mapping[Key, str], settings: LockedSettings, files: list[LockedFile], sources: Sources
) -> Iterator[str]:
    """The places of what must be there."""
    for config in settings.whole:
        for key in INPUT_PATHS:
            if not (key == "tokenizer" and _is_repository(config.get(key), sources)):
                yield from _several(config.get(key))
    for one in files:
        yield from one.wanted
    for part, place, what in rows:
        if part == MODEL and what == SHA256 and not place.startswith(f"{HUB}/"):
            yield place


def _left_out(files: list[LockedFile], sources: Sources) -> Iterator[tuple[str, Path]]:
    """The places of what there may be; a lock has bytes of a name that are no UTF-8 as \\xNN."""
    for place in (place for one in files for place in one.left_out):
        yield place, sources.of(place)
        if "\\x" in place:
            as_it_is = os.fsdecode(re.sub(rb"\\x([89a-f][0-9a-f])", _byte, os.fsencode(place)))
            yield as_it_is, sources.of(as_it_is)


def _byte(match: re.Match[bytes]) -> bytes:
    return bytes([int(match[1], 16)])


def _caches(files: list[LockedFile]) -> list[str]:
    """The cache directories; of a folder it is the folder itself where none is named."""
    return [one.get("cache_directory") or one.get("image_directory", "") for file in files for one in file.datasets]


def _several(value: Any) -> list[str]:
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str) and one]


def _is_repository(tokenizer: str | None, sources: Sources) -> bool:
    """Whether a tokenizer is named by its repository, which each machine has in its own place."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", tokenizer or "") is not None and not os.path.exists(sources.of(tokenizer))
