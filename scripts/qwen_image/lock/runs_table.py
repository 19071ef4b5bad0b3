"""The runs of a lock as a table, which is what a rebuild has in place of a grid: a cell holds almost any value."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from qwen_image.config import value_schema
from qwen_image.files import atomic_write
from qwen_image.lock.rows import CONFIG, RUN, Key, parts_of, settings_of
from qwen_image.problems import InputError, Problem
from qwen_image.runs.keys import NAME, TABLE
from qwen_image.runs.table import expand_runs
from qwen_image.training.schema import key_types

Runs = Mapping[str, Mapping[str, Any]]
"""What each run sets by itself."""


def runs_table(runs: Runs) -> str:
    """Return the table, as runs/table.py reads it."""
    text = io.StringIO()
    columns = sorted({key for run in runs.values() for key in run})
    table = csv.DictWriter(text, columns, delimiter="\t", lineterminator="\n")
    table.writeheader()
    table.writerows({key: _cell(key, value) for key, value in run.items()} for run in runs.values())
    return text.getvalue()


def misread(shared: Mapping[str, Any], runs: Runs) -> Iterator[tuple[str, str, str]]:
    """Yield what would be another in runs that are read from the table: the run, the key, and why.

    The settings are known ones; `shared` are those of all runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "runs.tsv")
        atomic_write(path, runs_table(runs).encode("utf-8", "surrogateescape"))
        try:
            read = expand_runs({**shared, TABLE: str(path)}, "the table")
        except InputError as error:
            yield next(iter(runs)), NAME, f"cannot stand in a table of runs: {error.problems[0].found}"
            return
    for (name, own), run in zip(runs.items(), read, strict=True):
        for key in sorted(own.keys() | run.own):
            now = run.config[key] if key in run.own else None
            if key not in own or key not in run.own or json.dumps(now) != json.dumps(own[key]):
                yield name, key, f"{own.get(key)!r} cannot stand in a table of runs, which would read {now!r}"


def check_runs(rows: Mapping[Key, str]) -> Iterator[Problem]:
    """Yield what runs have that a rebuild could not give them."""
    names = sorted(parts_of(rows, RUN), key=lambda run: int(rows[f"{RUN} {run}", "order", "number"]))
    runs = {run: _values(rows, f"{RUN} {run}") for run in names}
    if any(runs.values()):
        mend = "write it in another way: a rebuild has its runs in a table"
        for run, key, found in misread(_values(rows, CONFIG), runs):
            yield Problem(file=f"{RUN} {run}", key=key, found=found, mend=mend)


def _values(rows: Mapping[Key, str], part: str) -> dict[str, Any]:
    return {key: json.loads(text) for key, text in settings_of(rows, part).items()}


def _cell(key: str, value: Any) -> str:
    if isinstance(value, str) and set(key_types(value_schema(key))) <= {"string", "null"}:
        return value
    return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**9).strip()[1:-1]
