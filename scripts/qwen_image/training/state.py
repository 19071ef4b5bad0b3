"""States: everything a training needs to go on as if it had never stopped, each a folder that is complete or absent.

A state holds the adapter, the optimizer, the average of the adapter's weights and, as JSON, the step, the loss history
and what the training was made from. It needs no random numbers and no order of the data: both follow from the seed and
the step (randomness.py, batches.py). `resume: auto` goes on from the newest state that was made from the same.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from qwen_image.bounded import MAX_WRITTEN_BYTES, parse_json, read_text
from qwen_image.files import atomic_write, remove_abandoned, sync_folder
from qwen_image.problems import InputError, Problem
from qwen_image.training.tree import read_tree, write_tree

log = logging.getLogger(__name__)
VERSION = 1
FACTS, ADAPTER, OPTIMIZER, AVERAGE = "state.json", "model.safetensors", "optimizer.safetensors", "ema.safetensors"
DAMAGED = (OSError, SafetensorError, ValueError, KeyError, TypeError)
KINDS = {
    "step": int, "epoch": int, "skipped_steps": int, "recent_losses": list, "best_validation": float | int | None,
    "made_from": dict, "kept": bool, "version": int,
}  # fmt: skip
"""Of the facts, as JSON has them."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A state without its tensors."""

    step: int
    """Optimizer steps done, of all processes together."""
    epoch: int
    skipped_steps: int
    """Steps so far whose loss was no number."""
    recent_losses: list[float]
    best_validation: float | None
    made_from: Mapping[str, object]
    """Settings and inputs that bear on the result; see identity.py."""
    kept: bool
    """Whether it was asked for; others go once a newer one is complete."""
    version: int = VERSION


@dataclass(frozen=True)
class Saved:
    """A complete state on the disk."""

    folder: Path
    facts: Facts


def state_name(output_name: str, *, step: int | None = None, epoch: int | None = None) -> str:
    """Name of a state's folder, as the field has it: after a step, after an epoch (from 1), or at the end."""
    middle = f"-step{step:08d}" if step is not None else f"-{epoch:06d}" if epoch is not None else ""
    return f"{output_name}{middle}-state"


def write_state(
    folder: Path,
    facts: Facts,
    *,
    adapter: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, object],
    average: Mapping[str, object] | None,
    check: Callable[[], None],
) -> None:
    """Write a state under another name, then rename it: the folder is there with all its files or not at all.

    `check` is called before the rename, and raises when the state must not be there.
    """
    temporary = folder.with_name(f".tmp-{folder.name}-{secrets.token_hex(8)}")
    try:
        write_tree(temporary / ADAPTER, dict(adapter))
        write_tree(temporary / OPTIMIZER, optimizer)
        if average is not None:
            write_tree(temporary / AVERAGE, average)
        atomic_write(temporary / FACTS, json.dumps(asdict(facts), indent=1, ensure_ascii=True) + "\n")
        check()
        if folder.exists():
            # an earlier training's; it makes way only now
            old = folder.with_name(f".tmp-{folder.name}-{secrets.token_hex(8)}")
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_state(saved: Saved) -> tuple[dict, dict, dict | None]:
    """Return the adapter's tensors by name, the optimizer's state and the average's; raises InputError when damaged."""
    try:
        average = saved.folder / AVERAGE
        return (
            read_tree(saved.folder / ADAPTER),
            read_tree(saved.folder / OPTIMIZER),
            read_tree(average) if average.exists() else None,
        )
    except DAMAGED as error:
        mend = "remove this folder; the training then goes on from an older state, or starts anew"
        raise InputError([Problem(file=str(saved.folder), found=f"is damaged ({error})", mend=mend)]) from error


def read_facts(folder: Path) -> Saved | None:
    """Return the state in this folder, or None where there is none that this version can read."""
    try:
        facts = Facts(**parse_json(read_text(folder / FACTS, MAX_WRITTEN_BYTES)))
    except DAMAGED:
        return None
    sound = all(isinstance(getattr(facts, name), kind) for name, kind in KINDS.items())
    sound = sound and all(isinstance(loss, float | int) for loss in facts.recent_losses)
    return Saved(folder, facts) if sound and facts.version == VERSION else None


def list_states(output_dir: Path, output_name: str) -> list[Saved]:
    """Return the complete states of this name, those that have come furthest last."""
    pattern = re.compile(re.escape(output_name) + r"(-step\d{8}|-\d{6})?-state")
    folders = [path for path in _entries(output_dir) if pattern.fullmatch(path.name)]
    states = []
    for folder in folders:
        if (saved := read_facts(folder)) is not None:
            states.append(saved)
        else:
            log.warning(
                "train: %s cannot be gone on from: its %s is missing, damaged or of another version", folder, FACTS
            )
    # of equally far ones the one that was asked for, then any, but always the same
    return sorted(states, key=lambda saved: (saved.facts.step, saved.facts.kept, saved.folder.name))


def choose_state(states: Sequence[Saved], made_from: Mapping[str, object], total_steps: int) -> Saved | None:
    """Return the state that has come furthest, of those made from the same and not beyond the training's end."""
    fitting = [one for one in states if one.facts.made_from == made_from and one.facts.step <= total_steps]
    return fitting[-1] if fitting else None


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Return what differs between two trainings' origins, a line each: the key, what it was and what it is."""
    return [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def remove_passed(states: Sequence[Saved], newest: Path) -> None:
    """Remove the states that nobody asked for, but for the newest one, which must be complete."""
    for saved in states:
        if saved.folder != newest and not saved.facts.kept:
            remove_state(saved.folder)


def remove_state(folder: Path) -> None:
    """Remove a state. It is renamed first, so that no half of it is ever taken for one."""
    if folder.is_symlink() or not folder.is_dir():
        return
    doomed = folder.with_name(f".tmp-{folder.name}-{secrets.token_hex(8)}")
    folder.rename(doomed)
    # what a file system does not let go of yet, a later start removes
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(output_dir: Path, output_name: str) -> None:
    """Remove what killed trainings left: states of this name that were being written, and files."""
    remove_abandoned(output_dir)
    pattern = re.compile(rf"\.tmp-{re.escape(output_name)}(-step\d{{8}}|-\d{{6}})?-state-[0-9a-f]{{16}}")
    for path in _entries(output_dir):
        if pattern.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _entries(folder: Path) -> Iterator[Path]:
    with suppress(FileNotFoundError):
        yield from (Path(entry.path) for entry in os.scandir(folder))
