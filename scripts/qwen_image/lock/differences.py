"""What differs between a lock and what is there now, each difference with its reason.

A change of an input is told where it is, and a file that follows from it says so, so that of many differences the first
ones are the cause.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from qwen_image.lock.causes import (
    DAMAGED,
    HOW,
    INPUT_CHANGED,
    MODEL_CHANGED,
    PACKAGES_CHANGED,
    SETTINGS_CHANGED,
    Comparison,
    cache_file_cause,
    lora_cause,
    manifest_cause,
    toml_cause,
)
from qwen_image.lock.inputs import ABSENT, UNREADABLE
from qwen_image.lock.inventory import Inventory
from qwen_image.lock.rows import CACHE, CODE, CONFIG, DATASET, DEVICE, INPUT, MODEL, RUN, SETTING, SHA256, SOFTWARE, Key
from qwen_image.lock.settings import OF_A_REBUILD
from qwen_image.problems import Problem
from qwen_image.training.items import RERUN

ORDER = (SOFTWARE, CODE, CONFIG, DATASET, INPUT, MODEL, CACHE, RUN)
MENDS = {
    INPUT_CHANGED: "put the locked one back; or keep the change, run snakemake, and lock again",
    MODEL_CHANGED: "put the locked checkpoint back; or keep the other, run snakemake, and lock again",
    PACKAGES_CHANGED: "install the locked version; or, if all files are as locked, lock again",
    SETTINGS_CHANGED: "set it back; or keep the change, run snakemake, and lock again",
}
MAKE = {CACHE: RERUN, RUN: "run snakemake, which makes it again"}
FOLLOWS = "lock again if the cause is meant; else undo that and run snakemake"


@dataclass(frozen=True)
class Differences:
    """What differs, causes first, and what is only done in another way."""

    problems: list[Problem]
    notes: list[str]


def compare(locked: Mapping[Key, str], found: Inventory, lock: str) -> Differences:
    """Return the differences between a lock and an inventory. `lock` is the lock's name, for messages."""
    comparison = Comparison(locked, found)
    changed = sorted(comparison.changed, key=lambda key: (ORDER.index(_kind(key)) if _kind(key) in ORDER else -1, key))
    problems = []
    for (part, name), keys in groupby((key for key in changed if _counts(key)), key=lambda key: key[:2]):
        problems += _about(comparison, part, name, list(keys), lock)
    notes = [f"{key[1]} {key[2]}: {comparison.both(key)}" for key in changed if _kind(key) == DEVICE or _is_how(key)]
    return Differences(problems, notes)


def _kind(key: Key) -> str:
    return key[0].partition(" ")[0]


def _counts(key: Key) -> bool:
    return not (_explains(key) or _kind(key) == DEVICE or _is_how(key))


def _explains(key: Key) -> bool:
    """Whether a fact only explains a difference of a file's content. The files of items are named as anybody likes."""
    _, name, what = key
    if _kind(key) == RUN:
        return name in ("lora made with", "lora made from", "lora made by") or what == OF_A_REBUILD
    about_file = what == "bucket" or what.startswith(SHA256)
    explains = name == "arithmetic" or re.fullmatch(r"\[[0-9]+\] made by", name) is not None
    return _kind(key) == CACHE and explains and not about_file


def _is_how(key: Key) -> bool:
    return _kind(key) in (CONFIG, RUN) and key[1] == SETTING and key[2] in HOW


def _about(comparison: Comparison, part: str, name: str, keys: list[Key], lock: str) -> list[Problem]:
    """The differences in what has this name: one where all of it is new or gone, else one a fact."""
    there = comparison.names_there(part, name)
    if name != SETTING and there != (True, True):
        file = str(comparison.found.files.get(keys[0], part))
        found = f"new: not in {lock}" if there[1] else "missing: it was locked, and is not here now"
        mend = (
            "lock again if it is meant; else remove it" if there[1] else "put it back, or run snakemake if it was made"
        )
        return [Problem(file=part if file == part else f"{part}, {file}", key=name, found=found, mend=mend)]
    return [_difference(comparison, key) for key in keys]


def _difference(comparison: Comparison, key: Key) -> Problem:
    part, name, what = key
    old, new = comparison.locked.get(key), comparison.found.rows.get(key)
    shown = f"locked {_short(old)}, now {_short(new)}"
    place = f"{name}, {what}" if what != SHA256 else name
    path = comparison.found.files.get(key)
    where = f"{part}, {path}" if path is not None else part
    if new is None or new == ABSENT:
        return Problem(file=where, key=place, found=f"missing: {shown}", mend=MAKE.get(_kind(key), "put it back"))
    if new.startswith(UNREADABLE):
        return Problem(file=where, key=place, found=f"file damaged: {new}", mend="make it readable")
    cause = _cause(comparison, key)
    remake = f"remove the file, then {MAKE[_kind(key)]}" if _kind(key) in MAKE else ""
    mend = MENDS.get(cause) or (remake if cause.startswith(DAMAGED) else FOLLOWS)
    return Problem(file=where, key=place, found=f"{cause}: {shown}", mend=mend)


def _cause(comparison: Comparison, key: Key) -> str:
    _, name, what = key
    kind = _kind(key)
    if kind in (SOFTWARE, CODE):
        return PACKAGES_CHANGED
    if kind == MODEL:
        return MODEL_CHANGED
    of_run = kind == RUN and name in (SETTING, "order")
    if kind == CONFIG or of_run or (kind == DATASET and what.startswith(f"{SETTING} ")):
        return SETTINGS_CHANGED
    if kind == CACHE:
        if name in ("manifest", "digest", "rejects"):
            return manifest_cause(comparison, key)
        return cache_file_cause(comparison, key) if what != "bucket" else SETTINGS_CHANGED
    if kind == RUN:
        return toml_cause(comparison, key) if name == "config.toml" else lora_cause(comparison, key)
    return INPUT_CHANGED


def _short(value: str | None) -> str:
    if value is None:
        return "nothing"
    return f"{value[:12]}…" if len(value) == 64 and " " not in value else value
