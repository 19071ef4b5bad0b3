"""A grid of values instead of a table: a run for each combination, named after what differs. Imports no torch."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from qwen_image.dataset.listing import limit
from qwen_image.files import safe_name
from qwen_image.problems import InputError, Problem
from qwen_image.runs.keys import GRID, LONGEST_NAME, MAX_RUNS, NAME, cut, key_faults, meaning
from qwen_image.training.file_names import names_before


def grid_rows(grid: object, name: str | None, file: str) -> list[dict[str, Any]]:
    """Return what each run sets, its output_name included, the grid's last key varying fastest.

    `name` is the configuration's output_name, `file` the configuration. Raises InputError.
    """
    mend = "write it as key: [value, value]"
    if not isinstance(grid, Mapping) or not grid:
        raise InputError([Problem(file=file, key=GRID, found=f"found {cut(repr(grid))}", mend=mend)])
    problems = key_faults(grid, f"{file}: {GRID}")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            found = f"found {cut(repr(values))}"
            problems.append(Problem(file=file, key=f"{GRID}.{cut(key)}", found=found, mend=mend))
    if NAME in grid:
        mend_name = f"remove it; the names are made from {NAME} and the values that differ"
        problems.append(Problem(file=file, key=f"{GRID}.{NAME}", found="is no key of a grid", mend=mend_name))
    if name is None:
        problems.append(Problem(file=file, key=NAME, found="is missing", mend="the grid's names begin with it"))
    if not problems:
        twice = (problem for key, values in grid.items() for problem in _twice(key, values, file))
        problems = _too_many(grid, file) or list(twice)
    if problems:
        raise InputError(limit(problems))
    return _named(grid, str(name))


def _too_many(grid: Mapping[str, list], file: str) -> list[Problem]:
    count = math.prod(map(len, grid.values()))
    if count <= MAX_RUNS:
        return []
    found, mend = f"stands for {cut(str(count))} runs", f"{MAX_RUNS} are the most; leave values out"
    return [Problem(file=file, key=GRID, found=found, mend=mend)]


def _twice(key: str, values: list, file: str) -> list[Problem]:
    first: dict[Hashable, Any] = {}
    problems = []
    for value in values:
        if (meant := meaning(key, value)) in first:
            found = f"a value stands there twice: {cut(repr(first[meant]))} and {cut(repr(value))}"
            mend = "keep one: it would train the same LoRA again"
            problems.append(Problem(file=file, key=f"{GRID}.{key}", found=found, mend=mend))
        first.setdefault(meant, value)
    return problems


def _named(grid: Mapping[str, list], name: str) -> list[dict[str, Any]]:
    varying = {key: labels(values) for key, values in grid.items() if len(values) > 1}
    rows, names = [], []
    for places in itertools.product(*(range(len(values)) for values in grid.values())):
        at = dict(zip(grid, places, strict=True))
        rows.append({key: grid[key][place] for key, place in at.items()})
        parts = [safe_name(name), *(f"{key}_{varying[key][at[key]]}" for key in varying)]
        names.append(safe_name("-".join(parts), LONGEST_NAME))
    # where one key's value reads like the end of one and the next key
    shared = _shared(names)
    return [
        {**row, NAME: safe_name(f"{one}_{_hash(row)}", LONGEST_NAME) if one.lower() in shared else one}
        for row, one in zip(rows, names, strict=True)
    ]


def labels(values: Sequence[Any]) -> list[str]:
    """Return what each value of a key is called in the runs' names: different ones, in any case of letters.

    Of a path it is the last part, with the folder before it where another has the same, and else the value as it
    stands. Where that is not enough, or reads like a file that another's training saves, a hash tells them apart.
    """
    plain = [_label(value) for value in values]
    shared = _shared(plain)
    longer = [_with_folder(value) if one.lower() in shared else one for value, one in zip(values, plain, strict=True)]
    shared = _shared(longer)
    return [
        f"{one}_{_hash(value)}" if one.lower() in shared else one for value, one in zip(values, longer, strict=True)
    ]


def _label(value: object) -> str:
    text = "_".join(map(_label, value)) if isinstance(value, list) else str(value)
    return _safe(PurePath(text).stem if _is_path(value) else text)


def _with_folder(value: object) -> str:
    folder = PurePath(value).parent.name if _is_path(value) else ""
    return f"{_safe(folder)}_{_label(value)}" if folder else _label(value)


def _is_path(value: object) -> bool:
    return isinstance(value, str) and "/" in value


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text)


def _shared(names: Sequence[str]) -> set[str]:
    """Those that several have, in lower case: some file systems do not tell it from upper; or that another may save."""
    folded = [name.lower() for name in names]
    once = set(folded)
    saved = {name for name in once if not once.isdisjoint(names_before(name))}
    return {name for name, count in Counter(folded).items() if count > 1} | saved


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
