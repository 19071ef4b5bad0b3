"""Reads a dataset file (TOML or JSON) into one `DatasetSettings` a dataset, and reports all of its problems at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_image.bounded import parse_json, parse_toml, read_text
from qwen_image.dataset.buckets import MIN_AREA, STEP
from qwen_image.dataset.keys import KEYS, RENAMED, VIDEO_KEYS, describe
from qwen_image.problems import InputError, Nearest, Problem


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """One entry of `datasets`, with what it inherits from `general` and the defaults filled in."""

    index: int
    """Position in the file, from 0."""
    resolution: tuple[int, int]
    """(width, height) in pixels: the area that buckets aim at or, with buckets off, the exact size."""
    enable_bucket: bool
    bucket_no_upscale: bool
    caption_extension: str | None
    """Ending of the caption files with its dot; None only when the captions stand in a JSONL file."""
    multiple_captions: bool
    """Whether each line of a caption file is a caption by itself, and a JSONL file may give a list of captions."""
    batch_size: int
    num_repeats: int
    loss_weight: float
    """What its items count in the loss, above 0."""
    image_directory: str | None
    """As written, relative to the working directory. Exactly one of this and `image_jsonl_file` is set."""
    image_jsonl_file: str | None
    cache_directory: str
    """As written, or `image_directory`."""
    control_directory: str | None
    multiple_target: bool
    no_resize_control: bool
    control_resolution: tuple[int, int] | None
    alpha_background: str
    """What shows through transparent pixels: "white", "black" or "#rrggbb" in lower case."""


def load_dataset_config(path: str | Path) -> list[DatasetSettings]:
    """Read the dataset file at `path`, in the order of its `datasets`.

    Raises InputError with every problem of the file. Looks into no image directory.
    """
    file = str(path)
    general, tables, problems = _split(file, _read(file))
    inherited, in_general = _check_table(file, "general", general, problems)
    settings, caches = [], {}
    for index, table in enumerate(tables):
        where = f"datasets[{index}]"
        if not isinstance(table, dict):
            mend = "write each dataset as a table with its keys"
            problems.append(Problem(file=file, key=where, found=f"{describe(table)} is no table", mend=mend))
            continue
        own, present = _check_table(file, where, table, problems)
        values = {name: key.default for name, key in KEYS.items() if not key.ignored} | inherited | own
        problems += _combination_problems(file, where, values, present | in_general, VIDEO_KEYS & table.keys())
        cache = values["cache_directory"] or values["image_directory"]
        if cache is not None:
            caches[where] = cache
        settings.append(DatasetSettings(**(values | {"index": index, "cache_directory": cache})))
    problems += _cache_clashes(file, caches)
    if problems:
        raise InputError(problems)
    return settings


def _read(file: str) -> dict[str, Any]:
    """The content of the file, whichever of the two formats it is in."""
    suffix = Path(file).suffix.lower()
    if suffix not in (".toml", ".json"):
        found = f"a dataset file ends in .toml or .json, not in `{suffix}`"
        raise InputError([Problem(file=file, found=found, mend="give the path of a .toml or .json file")])
    try:
        text = read_text(file)
    except OSError as error:
        mend = f"check `dataset_config`; relative paths start at {Path.cwd()}"
        found = f"cannot be read: {error.strerror or error}"
        raise InputError([Problem(file=file, found=found, mend=mend)]) from error
    except UnicodeDecodeError as error:
        raise InputError([Problem(file=file, found="is not UTF-8 text", mend="save it as UTF-8")]) from error
    except ValueError as error:
        raise InputError([Problem(file=file, found=str(error), mend="give a dataset file")]) from error
    try:
        content = parse_toml(text) if suffix == ".toml" else parse_json(text, object_pairs_hook=_unique)
    except ValueError as error:
        raise InputError([_syntax_problem(file, suffix, error)]) from error
    if not isinstance(content, dict):
        found = f"{describe(content)} stands where an object is expected"
        raise InputError([Problem(file=file, found=found, mend='write {"general": {...}, "datasets": [{...}]}')])
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file; a key given twice is refused as TOML refuses it, instead of the last one winning."""
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key `{twice}` stands twice in one object")
    return table


def _syntax_problem(file: str, suffix: str, error: Exception) -> Problem:
    """The problem for a file that its parser refuses; both parsers put the line into their message."""
    line = re.search(r"\bline (\d+)", str(error))
    mend = "correct the JSON there (commas between entries, none after the last, double quotes)"
    if suffix == ".toml":
        mend = "correct the TOML there (text in quotes; a Windows path in single quotes, because of its backslashes)"
    found = f"is not valid {suffix[1:].upper()}: {error}"
    return Problem(file=file, key=f"line {line[1]}" if line else "", found=found, mend=mend)


def _split(file: str, content: dict[str, Any]) -> tuple[dict[str, Any], list[Any], list[Problem]]:
    """The two top-level entries of the file and what is wrong at that level."""
    problems = []

    def report(key: str, found: str, mend: str | Nearest) -> None:
        problems.append(Problem(file=file, key=key, found=found, mend=mend))

    for name in content.keys() - {"general", "datasets"}:
        if name in KEYS or name in RENAMED:
            place = "[general] or [[datasets]]" if KEYS[RENAMED.get(name, name)].in_general else "[[datasets]]"
            report(name, "stands outside of any table", f"move it below {place}")
        else:
            report(name, "is no entry of a dataset file", _suggestion(name, ["general", "datasets"]))
    problems.sort(key=lambda problem: problem.key)
    general, tables = content.get("general"), content.get("datasets")
    if general is not None and not isinstance(general, dict):
        report("general", f"{describe(general)} is no table", "write a table of keys that all datasets share")
        general = None
    if isinstance(tables, dict):
        report("datasets", "is one table, not a list of them", "write [[datasets]] with two brackets")
        tables = None
    elif not isinstance(tables, list) or not tables:
        found = "is missing" if tables is None else f"{describe(tables)} is no list of datasets"
        report("datasets", found if tables != [] else "has no entry", "add a [[datasets]] table for each image folder")
        tables = None
    return general or {}, tables or [], problems


def _check_table(
    file: str, where: str, table: dict[str, Any], problems: list[Problem]
) -> tuple[dict[str, Any], set[str]]:
    """Check the keys of one table one by one.

    Returns the good values in their final form under their present names, and the names that the table sets, whether
    well or badly.
    """
    values, present = {}, set()

    def report(name: str, found: str, mend: str | Nearest) -> None:
        problems.append(Problem(file=file, key=f"{where}.{name}", found=found, mend=mend))

    for written, value in table.items():
        name = RENAMED.get(written, written)
        if fault := _name_fault(name, where):
            report(written, *fault)
            continue
        if value is None:  # JSON's null means unset
            continue
        if name in present:
            report(written, f"sets `{name}` a second time", "keep one of the two; this is an old name for it")
            continue
        present.add(name)
        try:
            final = KEYS[name].check(value)
        except ValueError as expected:
            report(written, f"is {describe(value)}", str(expected))
            continue
        if not KEYS[name].ignored:
            values[name] = final
    return values, present


def _name_fault(name: str, where: str) -> tuple[str, str | Nearest] | None:
    """What is wrong with a key of this name in this table, and the mend; None when it may stand there."""
    if name in VIDEO_KEYS:
        return "is a key for video datasets", "this project trains on images: give image_directory or image_jsonl_file"
    if name == "debug_dataset":
        return "is not a key of dataset files", "remove it"
    if name not in KEYS:
        known = [key for key in KEYS if KEYS[key].in_general or where != "general"]
        return "is not a known key", _suggestion(name, known)
    if where == "general" and not KEYS[name].in_general:
        return "may not stand in [general]", "move it to the [[datasets]] entry that it is for"
    return None


def _suggestion(name: str, known: list[str]) -> Nearest:
    otherwise = f"remove it, or use one of: {', '.join(known)}"
    return Nearest(name.lower().replace("-", "_"), known, otherwise, form="did you mean `{}`?")


def _combination_problems(
    file: str, where: str, values: dict[str, Any], present: set[str], video: Iterable[str]
) -> list[Problem]:
    """What is wrong between the keys of one dataset. Keys with a bad value were reported before and count as given."""
    problems = []

    def report(name: str, found: str, mend: str) -> None:
        problems.append(Problem(file=file, key=f"{where}.{name}" if name else where, found=found, mend=mend))

    sources = {"image_directory", "image_jsonl_file"} & present
    if len(sources) == 2:
        report("image_jsonl_file", "is given together with image_directory", "keep one; make two datasets to use both")
    elif not sources and not video:
        report("", "has neither image_directory nor image_jsonl_file", "say where its images are with one of them")
    elif sources == {"image_directory"} and "caption_extension" not in present:
        mend = 'add caption_extension = ".txt" here or below [general]'
        report("caption_extension", "is missing; a folder of images needs it to find the captions", mend)
    elif sources == {"image_jsonl_file"} and "cache_directory" not in present:
        report("cache_directory", "is missing; a JSONL dataset needs one", "name a folder for its cache files")
    if values["multiple_target"]:
        mend = "set it to false or remove it"
        report("multiple_target", "is true, which needs the layered model; it is not supported", mend)
    width, height = values["resolution"]
    if values["enable_bucket"] and width * height < MIN_AREA:
        mend = f"use an area of at least {MIN_AREA} pixels (32x32)"
        report("resolution", f"{width}x{height} is too small for buckets", mend)
    elif not values["enable_bucket"] and (width % STEP or height % STEP):
        mend = f"use multiples of {STEP}, such as [{_nearest(width)}, {_nearest(height)}], or set enable_bucket = true"
        report("resolution", f"{width}x{height} is what every image would get, but the model cannot take it", mend)
    return problems


def _nearest(side: int) -> int:
    return max(STEP, round(side / STEP) * STEP)


def _cache_clashes(file: str, caches: dict[str, str]) -> list[Problem]:
    """Datasets whose cache directories are one place; `caches` maps ``datasets[i]`` to the directory as written."""
    problems, first = [], {}
    for where, written in caches.items():
        other = first.setdefault(_place(written), where)
        if other != where:
            found = f"`{written}` is the same folder as `{caches[other]}`, the cache directory of {other}"
            mend = "give each dataset a cache_directory of its own (without one, it is the image_directory)"
            problems.append(Problem(file=file, key=f"{where}.cache_directory", found=found, mend=mend))
    return problems


def _place(directory: str) -> tuple[int, int] | str:
    """What two spellings of one folder have in common, whether it exists already or not."""
    real = os.path.realpath(directory)
    try:
        # Beyond links this knows bind mounts and file systems that do not tell upper from lower case.
        status = os.stat(real)
    except OSError:
        return real
    return status.st_dev, status.st_ino
