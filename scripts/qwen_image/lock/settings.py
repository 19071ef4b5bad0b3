"""The settings that a rebuild takes from a lock or a LoRA, whoever wrote it: known keys, and nothing that leads out.

The configuration is data here, as it is for check_config: what Snakemake would take for a program is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qwen_image.bounded import parse_json
from qwen_image.config import check_config, check_values
from qwen_image.lock.rows import CONFIG, RUN, SETTING, SHA256, Key, Rows, Source, parts_of, settings_of
from qwen_image.problems import InputError, Problem
from qwen_image.runs.keys import GRID, TABLE
from qwen_image.training.identity import COPIES, TRACKERS

AWAY = TRACKERS | COPIES | {"resume"}
"""Settings that a rebuild goes without: it publishes nothing again, is logged nowhere, and starts at its first step."""
OF_A_REBUILD = f"{SHA256} without uploads, trackers and resume"
"""The trainer's TOML as a rebuild has it."""
CLASSES = {
    "optimizer_type": r"[\w-]+|(torch|transformers|diffusers|bitsandbytes|pytorch_optimizer)(\.\w+)+",
    "lr_scheduler_type": r"\w+|torch\.optim\.(lr_scheduler|swa_utils)\.\w+"
    r"|(transformers|diffusers)(\.optimization)?\.\w*[Ss]chedule\w*|pytorch_optimizer(\.\w+)*\.\w*[Ss]chedule\w*",
}
"""Keys that name a class to import, which runs its package's code, and the paths that are taken from anybody."""
ALLOW = "--allow_class"


@dataclass(frozen=True)
class LockedSettings:
    """A configuration as a lock has it."""

    shared: Mapping[str, Any]
    """What holds for all runs."""
    runs: Mapping[str, Mapping[str, Any]]
    """What each run sets by itself, in their order."""

    @property
    def whole(self) -> list[dict[str, Any]]:
        """Each run's configuration."""
        return [{**self.shared, **own} for own in self.runs.values()] or [dict(self.shared)]


def locked_settings(
    rows: Mapping[Key, str], source: Source, how: Mapping[str, Any], allowed: Collection[str] = ()
) -> LockedSettings:
    """Return the settings, with `how` in place of the locked ones.

    `allowed` are paths of classes that the user trusts. Raises InputError for all that is no setting, that no run can
    have, or that would run the code of a package that this project does not know.
    """
    problems: list[Problem] = []
    shared = _values(rows, CONFIG, source, problems) | dict(how)
    order = {run: _number(rows, run, source, problems) for run in parts_of(rows, RUN)}
    runs = {run: _values(rows, f"{RUN} {run}", source, problems) for run in sorted(order, key=order.__getitem__)}
    if problems:
        raise InputError(problems)
    settings = LockedSettings(shared, runs)
    for config, run in zip(settings.whole, runs or [None], strict=True):
        for problem in _problems(config, source.file, allowed):
            problems.append(_placed(problem, run, rows, source, how))
    if problems:
        raise InputError(list(dict.fromkeys(problems)))
    return settings


def without_away(rows: Mapping[Key, str]) -> Rows:
    """Return the facts as they are of a rebuild, which goes without some settings."""
    kept = {key: value for key, value in rows.items() if not (key[1] == SETTING and key[2] in AWAY)}
    for part, name, what in rows:
        if what == OF_A_REBUILD:
            kept[part, name, SHA256] = kept.pop((part, name, what))
    return kept


def _values(rows: Mapping[Key, str], part: str, source: Source, problems: list[Problem]) -> dict[str, Any]:
    values = {}
    for key, text in settings_of(rows, part).items():
        try:
            values[key] = parse_json(text)
        except ValueError as error:
            problems.append(source.problem((part, SETTING, key), f"is no JSON value ({error})"))
    return {key: value for key, value in values.items() if key not in AWAY}


def _number(rows: Mapping[Key, str], run: str, source: Source, problems: list[Problem]) -> int:
    key = f"{RUN} {run}", "order", "number"
    text = rows.get(key, "")
    if re.fullmatch(r"[0-9]{1,9}", text):
        return int(text)
    problems.append(source.problem(key, f"found {text[:60]!r}, and no number" if key in rows else "is missing"))
    return 0


def _problems(config: Mapping[str, Any], file: str, allowed: Collection[str]) -> Iterator[Problem]:
    try:
        check_values(config, file)
    except InputError as error:
        yield from error.problems
        return
    for key in (TABLE, GRID):
        if config.get(key) is not None:
            found, mend = "is no setting of a lock, which has its runs one by one", "remove the line"
            yield Problem(file=file, key=key, found=found, mend=mend)
    yield from check_config(config, file)
    for key, known in CLASSES.items():
        path = config.get(key)
        if isinstance(path, str) and path not in allowed and not re.fullmatch(known, path):
            found = f"found {path!r}, and using that class runs the code of a package that this project does not know"
            mend = f"look at the package; if you trust it, name the class yourself: {ALLOW} {path}"
            yield Problem(file=file, key=key, found=found, mend=mend)


def _placed(
    problem: Problem, run: str | None, rows: Mapping[Key, str], source: Source, how: Mapping[str, Any]
) -> Problem:
    """The problem, where it stands: in the lock's line of the run or of all, or on the command line."""
    if problem.key in how:
        return replace(problem, file="command line", key=f"--how {problem.key}")
    for part in (f"{RUN} {run}", CONFIG):
        if (part, SETTING, problem.key) in rows:
            return source.problem((part, SETTING, problem.key), problem.found, problem.mend)
    return problem
