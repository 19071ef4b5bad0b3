"""All facts of a workflow as they are on disk now, every file read: what a lock holds, and what is compared with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from qwen_image.lock.hashing import DAMAGED, content_sha256, made_sha256
from qwen_image.lock.inputs import (
    ABSENT,
    UNREADABLE,
    Fact,
    config_facts,
    dataset_facts,
    model_facts,
    other_input_facts,
    software_facts,
)
from qwen_image.lock.layout import KINDS, Layout
from qwen_image.lock.outputs import cache_facts, run_facts
from qwen_image.lock.rows import CACHE, RUN, Key, Rows, parts_of
from qwen_image.lock.runs_table import check_runs
from qwen_image.problems import InputError, Problem
from qwen_image.training.items import RERUN

TRAIN = "run snakemake, which trains it again"
THREADS = 8
"""Hashing waits for the disk, and leaves Python's lock while it computes."""


@dataclass(frozen=True)
class Inventory:
    """The facts, and where those lie that are a file's content."""

    rows: Rows
    files: Mapping[Key, Path]
    damaged: frozenset[Path] = frozenset()
    """Files that were made, and whose data are not those that their own headers name."""


def take_inventory(layout: Layout, *, inputs_only: bool = False) -> Inventory:
    """Return the facts. What is missing or cannot be read has that as its value; memos of hashes are not asked."""
    # before anything that may name them, so that each path's place is the same every time
    facts = [*software_facts(), *config_facts(layout)]
    facts += [*dataset_facts(layout), *model_facts(layout), *other_input_facts(layout)]
    if not inputs_only:
        facts += [*cache_facts(layout), *run_facts(layout)]
    return _hashed(facts)


def to_lock(inventory: Inventory) -> Rows:
    """Return the facts to lock. Raises InputError where something is not there, or was made from something else."""
    rows = inventory.rows
    problems = [
        Problem(file=str(inventory.files.get(key, key[0])), found=value, mend="run snakemake first, then lock again")
        for key, value in sorted(rows.items())
        if value == ABSENT or value.startswith(UNREADABLE)
    ]
    problems += [
        Problem(file=str(path), found=DAMAGED, mend=f"delete it, and {RERUN if key[0].startswith(CACHE) else TRAIN}")
        for key, path in sorted(inventory.files.items())
        if path in inventory.damaged
    ]
    problems += check_runs(rows)
    for run in parts_of(rows, RUN):
        problems += _made_from_others(rows, run)
    if problems:
        raise InputError(problems)
    return dict(rows)


def _made_from_others(rows: Rows, run: str) -> list[Problem]:
    """What a LoRA says it was made from, and nothing here is."""
    here = {value for key, value in rows.items() if not key[0].startswith(f"{RUN} ")}
    said = {key[2]: value for key, value in rows.items() if key[:2] == (f"{RUN} {run}", "lora made from")}
    # a cache that is not kept is no longer here
    kept = {f"{kind}_manifest" for kind in KINDS if any(part.endswith(f" {kind}") for part, _, _ in rows)}
    strange = [name for name in (*sorted(kept), "dit") if name in said]
    mend = "run snakemake, which trains it again, then lock"
    return [
        Problem(file=f"{RUN} {run}", key="lora", found=f"was made from another {name} than is here", mend=mend)
        for name in strange
        if said[name] not in here
    ]


def _hashed(facts: Iterable[Fact]) -> Inventory:
    facts = list(facts)
    wanted = {value for _, value in facts if isinstance(value, Path)}
    made = {value for key, value in facts if isinstance(value, Path) and key[0].startswith((f"{CACHE} ", f"{RUN} "))}
    wanted |= {file for _, value in facts if isinstance(value, tuple) for file in value}
    files = sorted(wanted)
    with ThreadPoolExecutor(THREADS) as pool:
        # silent where it takes a moment
        bar = tqdm(
            pool.map(lambda file: _content(file, file in made), files), total=len(files), desc="hash", unit="file",
            delay=3, ncols=100, leave=False,
        )  # fmt: skip
        hashed = dict(zip(files, bar, strict=True))
    contents = {file: content for file, (content, _) in hashed.items()}
    rows = {}
    for key, value in facts:
        if isinstance(value, Path):
            rows[key] = contents[value]
        else:
            rows[key] = _identity([contents[file] for file in value]) if isinstance(value, tuple) else value
    damaged = frozenset(file for file, (_, is_sound) in hashed.items() if not is_sound)
    return Inventory(rows, {key: value for key, value in facts if isinstance(value, Path)}, damaged)


def _content(file: Path, is_made: bool) -> tuple[str, bool]:
    """The file's hash, or why there is none, and whether what was made is still what it was."""
    try:
        return made_sha256(file) if is_made else (content_sha256(file), True)
    except FileNotFoundError:
        return ABSENT, True
    except OSError as error:
        return f"{UNREADABLE}: {error.strerror or error}", True
    except ValueError as error:
        return f"{UNREADABLE}: {error}", True


def _identity(contents: list[str]) -> str:
    """The identity of a model of these files, as models/identity.py computes it from a memo."""
    try:
        return hashlib.sha256(b"".join(bytes.fromhex(content) for content in contents)).hexdigest()
    except ValueError:  # one of them is not there
        return ABSENT
