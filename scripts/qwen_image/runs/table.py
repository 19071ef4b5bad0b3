"""Several trainings from one configuration: a table with a row a run, or a grid of values.

`runs: config/runs.tsv` names a table (.tsv or .csv) with a column `output_name` and one for each key that differs.
`runs_grid: {key: [values]}` stands for the table of all combinations, named after what differs. What a run does not set
is as in the configuration; an empty cell sets nothing. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qwen_image.bounded import parse_yaml
from qwen_image.config import check_config, check_values, value_schema
from qwen_image.dataset.listing import limit
from qwen_image.files import safe_name
from qwen_image.problems import InputError, Problem
from qwen_image.runs.grid import grid_rows
from qwen_image.runs.keys import GRID, LONGEST_NAME, NAME, TABLE, cut, key_faults
from qwen_image.runs.table_file import read_table
from qwen_image.training.file_names import names_before
from qwen_image.training.schema import key_types

NULL = re.compile("null|Null|NULL|~")
"""What YAML takes for no value."""


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
        rows = grid_rows(grid, shared.get(NAME), file)
        return _checked([_run(shared, f"{file}: {GRID}", row) for row in rows])
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
    columns, rows = read_table(table, file)
    path = str(table)
    problems = key_faults(columns, path)
    if NAME not in columns:
        mend = "add it: each run's LoRA is named after it"
        problems.append(Problem(file=path, key=NAME, found="the column is missing", mend=mend))
    if not rows:
        problems.append(Problem(file=path, found="has no row", mend="add a row for each run"))
    if problems:
        raise InputError(limit(problems))
    placed = [(f"{path}: line {line}", cells) for line, cells in rows]
    values = [
        (where, {key: _value(key, text, where, problems) for key, text in cells.items()}) for where, cells in placed
    ]
    if problems:
        raise InputError(limit(problems))
    return values


def _value(key: str, text: str, where: str, problems: list[Problem]) -> Any:
    """Return what the cell would mean in the configuration file."""
    types = set(key_types(value_schema(key)))
    if types <= {"string", "null"}:
        return None if "null" in types and NULL.fullmatch(text) else text
    try:
        return parse_yaml(text)
    except ValueError:
        mend = "write the value as in the configuration file, a list as [a, b]"
        problems.append(Problem(file=where, key=key, found=f"{cut(text)!r} is no value", mend=mend))
        return None


def _checked(runs: list[Run]) -> list[Run]:
    """Return the runs; raises InputError when names are missing, unsafe, or not the runs' own."""
    problems: list[Problem] = []
    first: dict[str, Run] = {}
    for run in runs:
        name = run.config.get(NAME) if NAME in run.own else None
        if name is None:
            mend = "give the run a name: its LoRA is called so"
            problems.append(Problem(file=run.where, key=NAME, found="is missing", mend=mend))
        elif run.name != safe_name(run.name, LONGEST_NAME):
            mend = f"use letters, digits, `.`, `_` and `-`, at most {LONGEST_NAME} of them"
            found = f"{cut(run.name)!r} is no name for a run"
            problems.append(Problem(file=run.where, key=NAME, found=found, mend=mend))
        # some file systems do not tell upper from lower case
        elif (other := first.setdefault(run.name.lower(), run)) is not run:
            found = f"{run.name!r} is the name of another run ({other.where})"
            problems.append(Problem(file=run.where, key=NAME, found=found, mend="give each run its own"))
    problems += [problem for run in first.values() for problem in _saved_by_another(run, first)]
    if problems:
        raise InputError(limit(problems))
    return runs


def _saved_by_another(run: Run, by_name: Mapping[str, Run]) -> list[Problem]:
    """The run's LoRA has the name of one that another run may save while it trains."""
    return [
        Problem(
            file=run.where,
            key=NAME,
            found=f"{run.name}.safetensors is also a file that the run {other.name!r} may save ({other.where})",
            mend="give the run a name that does not go on like this",
        )
        for name in names_before(run.name.lower())
        if (other := by_name.get(name)) is not None
    ]
