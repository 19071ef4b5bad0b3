"""Where a training starts: at its first step, or where a state of an earlier one left off."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_image.problems import InputError, Problem
from qwen_image.training.hub import fetch_state
from qwen_image.training.state import Saved, choose_state, differences, list_states, read_facts, remove_leftovers
from qwen_image.training.together import first_decides

if TYPE_CHECKING:
    from accelerate import Accelerator

    from qwen_image.training.arguments import Settings

log = logging.getLogger(__name__)


def starting_point(
    settings: Settings, accelerator: Accelerator, origin: Mapping[str, object], total_steps: int
) -> Saved | None:
    """Return the state to go on from, the same one in every process, or None to start anew.

    Raises InputError when a state that was named cannot be used, with what differs.
    """

    def look() -> Saved | None:
        remove_leftovers(Path(settings.output_dir), settings.output_name)
        return _choose(settings, origin, total_steps)

    # one process looks: while others still do, the first might already save or remove states
    return first_decides(accelerator, look)


def _choose(settings: Settings, origin: Mapping[str, object], total_steps: int) -> Saved | None:
    if settings.resume == "none":
        return None
    # one that this very training has saved since has come further on the same way
    own = choose_state(list_states(Path(settings.output_dir), settings.output_name), origin, total_steps)
    if settings.resume_from_huggingface:
        return own or _named(fetch_state(settings), origin, total_steps)
    if settings.resume != "auto":
        named = _named(Path(settings.resume), origin, total_steps)
        return max(named, own or named, key=lambda saved: saved.facts.step)
    return _newest(settings, origin, total_steps)


def _newest(settings: Settings, origin: Mapping[str, object], total_steps: int) -> Saved | None:
    states = list_states(Path(settings.output_dir), settings.output_name)
    chosen = choose_state(states, origin, total_steps)
    if chosen is None and states:
        newest = states[-1]
        reasons = differences(newest.facts.made_from, origin) or [_beyond(newest, total_steps)]
        log.warning("train: starting anew, not from %s: %s", newest.folder, "; ".join(reasons))
    return chosen


def _named(folder: Path, origin: Mapping[str, object], total_steps: int) -> Saved:
    """Return the state in a folder that the user named; it must be of the same settings and data."""
    saved = read_facts(folder)
    if saved is None:
        mend = "name a folder *-state that this program wrote, or set resume: auto"
        raise InputError([Problem(file=str(folder), key="resume", found="holds no state", mend=mend)])
    if reasons := differences(saved.facts.made_from, origin):
        mend = "change them back, or set resume: none to start anew (network_weights starts from a LoRA's weights)"
        found = f"is a state of another training: {'; '.join(reasons)}"
        raise InputError([Problem(file=str(folder), key="resume", found=found, mend=mend)])
    if saved.facts.step > total_steps:
        mend = "raise max_train_steps, or name an earlier state"
        raise InputError([Problem(file=str(folder), key="resume", found=_beyond(saved, total_steps), mend=mend)])
    return saved


def _beyond(saved: Saved, total_steps: int) -> str:
    return f"it has done {saved.facts.step} steps, and this training ends after {total_steps}"
