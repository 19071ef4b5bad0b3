"""Several trainings from one configuration: a table with a row a run, or a grid of values.

`runs: config/runs.tsv` names a table (.tsv or .csv) with a column `output_name` and one for each key that differs.
`runs_grid: {key: [values]}` stands for the table of all combinations, named after what differs. What a run does not set
is as in the configuration; an empty cell sets nothing. Imports no torch, and pandas only where there is a table.
"""

from __future__ import annotations

import difflib
import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from qwen_image.bounded import parse_yaml, read_bytes
from qwen_image.config import check_config, check_values, known_keys, value_schema
from qwen_image.files import safe_name
from qwen_image.problems import InputError, Problem
from qwen_image.training.schema import key_types

TABLE, GRID, NAME = "runs", "runs_grid", "output_name"
MAX_RUNS = 10_000
"""Of a grid. Snakemake takes a second for a few hundred."""
LONGEST_NAME = 120
"""Of a run, in characters."""
SHARED = {
    "output_dir": "the LoRAs of a table go into one folder, each under its own output_name",
    "caching_shards": "a cache is made once, for all runs that use it",
    "on_bad_item": "a cache is made once, for all runs that use it",
    "deterministic": "a cache is made once, for all runs that use it",
    "adopt_existing": "a cache is made once, for all runs that use it",
    **{
        f"caching_{stage}_{key}": "a cache is made once, for all runs that use it"
        for stage in ("latent", "teo")
        for key in ("device", "batch_size", "num_workers", "skip_existing", "keep_cache")
    },
    TABLE: "a run has no runs of its own",
    GRID: "a run has no runs of its own",
}
"""Keys that hold for all runs, and why no run has its own."""
IN_DATASET_FILE = ("resolution", "enable_bucket", "bucket_no_upscale", "num_repeats", "batch_size", "cache_directory")
"""Keys that people look for here, and that belong into the dataset file."""


@dataclass(frozen=True)
class Run:
    """One training's configuration."""

    name: str
    """Its output_name; of several runs, one that is safe in any path."""
    config: Mapping[str, Any]
    """All of its keys, those of the configuration file included."""
    own: frozenset[str] = frozenset()
    """Keys that its row sets."""
    where: str = ""
    """Its place for messages: the file, and the row."""


def expand_runs(config: Mapping[str, Any], file: str) -> list[Run]:
    """Return the runs of a configuration, in the table's order; a configuration without a table is one run.

    Raises InputError for what is wrong with the table or the grid themselves: the runs' keys are not checked yet.
    """
    check_values(config, file)
    shared = {key: value for key, value in config.items() if key not in (TABLE, GRID)}
    table, grid = config.get(TABLE), config.get(GRID)
    if table is not None and grid is not None:
        found, mend = f"is given together with {TABLE}", "keep one: a table can hold the grid's rows"
        raise InputError([Problem(file=file, key=GRID, found=found, mend=mend)])
    if table is not None:
        return _checked([_run(shared, where, row) for where, row in _read_table(table, file)])
    if grid is not None:
        return _checked(_grid_runs(shared, grid, file))
    return [Run(str(shared.get(NAME, "")), shared)]


def key_problems(config: Mapping[str, Any], file: str) -> list[Problem]:
    """Return what is wrong with the keys of all runs. Opens no file but the table; raises InputError for that."""
    runs = expand_runs(config, file)
    return list(dict.fromkeys(problem for run in runs for problem in placed(run, check_config(run.config, file), file)))


def placed(run: Run, problems: Iterable[Problem], file: str) -> list[Problem]:
    """Return the problems; those that `file`, the configuration, has with keys that a row sets, as that row's."""
    return [
        replace(problem, file=run.where) if problem.file == file and problem.key in run.own else problem
        for problem in problems
    ]


def _run(shared: Mapping[str, Any], where: str, row: Mapping[str, Any]) -> Run:
    return Run(str(row.get(NAME, "")), {**shared, **row}, frozenset(row), where)


def _read_table(table: object, file: str) -> list[tuple[str, dict[str, Any]]]:
    """Return each row's place and the values that it sets."""
    frame = _read_frame(table, file)
    path = str(table)
    problems = _key_problems(frame.columns, path)
    if NAME not in frame.columns:
        mend = "add it: each run's LoRA is named after it"
        problems.append(Problem(file=path, key=NAME, found="the column is missing", mend=mend))
    if not len(frame):
        problems.append(Problem(file=path, found="has no row", mend="add a row for each run"))
    if problems:
        raise InputError(problems)
    rows = []
    for number, cells in enumerate(frame.to_dict("records"), start=2):  # the first line is the columns' names
        where = f"{path}: line {number}"
        given = {key: text.strip() for key, text in cells.items() if text.strip()}
        rows.append((where, {key: _value(key, text, where, problems) for key, text in given.items()}))
    if problems:
        raise InputError(problems)
    return rows


def _read_frame(table: object, file: str):
    """Return the table's cells as text, empty where they are."""
    separators = {".tsv": "\t", ".csv": ","}
    if not isinstance(table, str) or PurePath(table).suffix.lower() not in separators:
        mend = "name a table that ends in .tsv or .csv"
        raise InputError([Problem(file=file, key=TABLE, found=f"found {table!r}", mend=mend)])
    import pandas

    try:
        frame = pandas.read_csv(
            io.BytesIO(read_bytes(table)), sep=separators[PurePath(table).suffix.lower()], dtype=str,
            keep_default_na=False, encoding="utf-8-sig", header=None, skip_blank_lines=True, index_col=False,
        )  # fmt: skip
    except OSError as error:
        mend = f"check `{TABLE}` in {file}; relative paths start at {Path.cwd()}"
        found = f"cannot be read: {error.strerror or error}"
        raise InputError([Problem(file=table, found=found, mend=mend)]) from error
    except ValueError as error:  # pandas' parser errors and undecodable text are such
        mend = "save it as UTF-8, with as many cells in each line as there are columns"
        raise InputError([Problem(file=table, found=f"is no such table ({error})", mend=mend)]) from error
    names = [str(name).strip() for name in frame.iloc[0]]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        found = f"these columns stand there twice: {', '.join(map(repr, twice))}"
        raise InputError([Problem(file=table, found=found, mend="keep one of each")])
    return frame.iloc[1:].set_axis(names, axis=1).fillna("")


def _value(key: str, text: str, where: str, problems: list[Problem]) -> Any:
    """Return what the cell would mean in the configuration file."""
    if set(key_types(value_schema(key))) <= {"string", "null"}:
        return text
    try:
        return parse_yaml(text)
    except ValueError:
        mend = "write the value as in the configuration file, a list as [a, b]"
        problems.append(Problem(file=where, key=key, found=f"{text!r} is no value", mend=mend))
        return None


def _grid_runs(shared: Mapping[str, Any], grid: object, file: str) -> list[Run]:
    """Return a run for each combination of the grid's values, the last key varying fastest."""
    mend = "write it as key: [value, value]"
    if not isinstance(grid, Mapping) or not grid:
        raise InputError([Problem(file=file, key=GRID, found=f"found {grid!r}", mend=mend)])
    problems = _key_problems(grid, f"{file}: {GRID}")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            problems.append(Problem(file=file, key=f"{GRID}.{key}", found=f"found {values!r}", mend=mend))
        elif any(values.count(value) > 1 for value in values):
            found, mend_twice = "a value stands there twice", "keep one: it would train the same LoRA again"
            problems.append(Problem(file=file, key=f"{GRID}.{key}", found=found, mend=mend_twice))
    if (count := math.prod(len(values) for values in grid.values() if isinstance(values, list))) > MAX_RUNS:
        found, fewer = f"stands for {count} runs", f"{MAX_RUNS} are the most; leave values out"
        problems.append(Problem(file=file, key=GRID, found=found, mend=fewer))
    if NAME in grid:
        mend_name = f"remove it; the names are made from {NAME} and the values that differ"
        problems.append(Problem(file=file, key=f"{GRID}.{NAME}", found="is no key of a grid", mend=mend_name))
    if shared.get(NAME) is None:
        problems.append(Problem(file=file, key=NAME, found="is missing", mend="the grid's names begin with it"))
    if problems:
        raise InputError(problems)
    varying = [key for key, values in grid.items() if len(values) > 1]
    runs = []
    for values in itertools.product(*grid.values()):
        row = dict(zip(grid, values, strict=True))
        parts = [safe_name(str(shared[NAME])), *(f"{key}_{_label(row[key])}" for key in varying)]
        name = safe_name("-".join(parts), LONGEST_NAME)
        runs.append(_run(shared, f"{file}: {GRID}", {**row, NAME: name}))
    return runs


def _label(value: object) -> str:
    """Return a value as it stands in a run's name: of a path its last part, nothing that is unsafe in paths."""
    text = "_".join(map(_label, value)) if isinstance(value, list) else str(value)
    name = PurePath(text).stem if isinstance(value, str) and "/" in value else text
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)


def _key_problems(keys: Iterable[object], place: str) -> list[Problem]:
    """Return what is wrong with the columns' names."""
    problems = []
    for key in map(str, keys):
        if key in SHARED:
            mend = "set it in the configuration file"
            problems.append(Problem(file=place, key=key, found=f"holds for all runs: {SHARED[key]}", mend=mend))
        elif key in IN_DATASET_FILE and key not in known_keys():
            mend = "write a second dataset file, and name it in a column dataset_config"
            problems.append(Problem(file=place, key=key, found="is a key of the dataset file", mend=mend))
        elif key not in known_keys():
            close = difflib.get_close_matches(key, known_keys(), n=1)
            mend = f"did you mean {close[0]}?" if close else "remove it; config/README.md lists the keys"
            problems.append(Problem(file=place, key=key or "(no name)", found="is not a known key", mend=mend))
    return problems


def _checked(runs: list[Run]) -> list[Run]:
    """Return the runs; raises InputError when names are missing, unsafe or given twice."""
    problems, first = [], {}
    for run in runs:
        name = run.config.get(NAME) if NAME in run.own else None
        if name is None:
            mend = "give the run a name: its LoRA is called so"
            problems.append(Problem(file=run.where, key=NAME, found="is missing", mend=mend))
        elif run.name != safe_name(run.name, LONGEST_NAME):
            mend = f"use letters, digits, `.`, `_` and `-`, at most {LONGEST_NAME} of them"
            problems.append(Problem(file=run.where, key=NAME, found=f"{run.name!r} is no name for a run", mend=mend))
        elif (other := first.setdefault(run.name.lower(), run)) is not run:
            # some file systems do not tell upper from lower case
            found = f"{run.name!r} is the name of another run ({other.where})"
            problems.append(Problem(file=run.where, key=NAME, found=found, mend="give each run its own"))
    if problems:
        raise InputError(problems)
    return runs
