"""What a training left behind, read to compare it with others: settings, losses, its LoRA, how long it took.

A run's folder is ``results/train/{run}`` of the directory that the workflow ran in, which is where the paths in its
settings start from.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pandas

from qwen_image.bounded import parse_json, parse_yaml, read_text
from qwen_image.container import ContainerError, read_header
from qwen_image.files import sha256_file
from qwen_image.problems import InputError, Problem
from qwen_image.training.file_names import best_name
from qwen_image.training.interruption import ALREADY_FINISHED, GOES_ON, WENT_ON
from qwen_image.training.logger import loss_table_name, validation_table_name
from qwen_image.training.provenance import PATHS, PREFIX, last_name

TRAINED = "trained"
FOLDERS = Path("results/train")
RESOLVED = "resolved.yaml"
DIGEST = "lora.sha256"

Curve = list[tuple[int, float]]
"""Pairs of a step, counted from 1, and what was measured after it."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training, finished or not."""

    root: Path
    """The directory that the workflow ran in, as paths here are to begin."""
    key: str
    """What its folders are called."""
    name: str
    """What it is called here."""
    state: str
    """TRAINED, or in words what it is instead."""
    settings: Mapping[str, object]
    """The resolved configuration; empty where there is none yet."""
    training_losses: Curve
    """At each step the mean over the last epoch's worth of steps."""
    validation_losses: Curve
    lora: Path | None = None
    """The trained LoRA."""
    sha256: str | None = None
    best_lora: Path | None = None
    """The LoRA with the lowest validation loss."""
    seconds: float | None = None
    """How long the last session of its training took, from the program's start to its checked LoRA."""
    timed_steps: int | None = None
    """Steps that were done in that time."""
    warnings: Sequence[str] = ()

    @property
    def trained(self) -> bool:
        """Whether it is finished."""
        return self.state == TRAINED

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.training_losses[-1][0] if self.training_losses else 0

    @property
    def best(self) -> tuple[int, float] | None:
        """The first step with the lowest validation loss, and that loss; None where none is a number."""
        finite = [(step, loss) for step, loss in self.validation_losses if math.isfinite(loss)]
        return min(finite, key=lambda pair: pair[1], default=None)

    @property
    def final_validation_loss(self) -> float:
        """NaN where there is none."""
        return self.validation_losses[-1][1] if self.validation_losses else math.nan

    @property
    def final_training_loss(self) -> float:
        """The average at the last step; NaN where there is none."""
        return self.training_losses[-1][1] if self.training_losses else math.nan


def find_folders(words: Sequence[str]) -> list[Path]:
    """Return the folders of runs given by name or by folder, or of all that are here when none is given.

    A folder that is not there is returned as well. Raises InputError when nothing is given and nothing is here.
    """
    if not words:
        folders = sorted(path.parent for path in FOLDERS.glob(f"*/{RESOLVED}"))
        if not folders:
            mend = "go to the directory that snakemake ran in, or name the runs' folders"
            raise InputError([Problem(file=str(FOLDERS), found="holds no run", mend=mend)])
        return folders
    folders = [Path(word) if os.sep in word or Path(word, RESOLVED).exists() else FOLDERS / word for word in words]
    return list(dict.fromkeys(folders))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read runs, however far they came. Those that share a name have the directory that each is in added to it."""
    runs = [_read_run(folder) for folder in folders]
    names = Counter(run.name for run in runs)
    return [replace(run, name=f"{run.name} ({run.root})") if names[run.name] > 1 else run for run in runs]


def _read_run(folder: Path) -> Run:
    settings = _read_settings(folder / RESOLVED)
    root = Path(os.path.normpath(folder / "../../.."))
    key = os.path.basename(os.path.abspath(folder))
    name = str(settings.get("output_name", key))
    output_dir = root / str(settings.get("output_dir", ""))
    trained = (folder / DIGEST).exists() and (output_dir / f"{name}.safetensors").exists()

    def curve(table: str, column: str) -> Curve:
        # a table has another name while its training is under way
        files = [output_dir / table] if trained else [output_dir / f"{table}.part", output_dir / table]
        return next((_read_curve(file, column) for file in files if settings and file.exists()), [])

    losses = curve(loss_table_name(name), "loss_average")
    validated = bool(settings.get("validation_split"))
    run = Run(
        root=root,
        key=key,
        name=name,
        state=TRAINED if trained else _what_became(root, folder, losses[-1][0] if losses else 0),
        settings=settings,
        training_losses=losses,
        validation_losses=curve(validation_table_name(name), "loss") if validated else [],
    )
    return _with_result(run, folder, output_dir / name) if trained else run


def value_text(value: object) -> str:
    """Return a setting's value as a configuration would spell it; nothing for one that is not set."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _with_result(run: Run, folder: Path, stem: Path) -> Run:
    """Add what only a finished run has. `stem` is its LoRA's path without the ending."""
    lora, best = Path(f"{stem}.safetensors"), stem.with_name(best_name(stem.name))
    sha256 = sha256_file(lora)
    warnings = [_other_settings(run, lora)]
    if (folder / DIGEST).read_text(encoding="utf-8").split()[:1] != [sha256]:
        warnings.append(f"{run.name}: {lora} is not the file that was checked after training")
    seconds, start = _time(run)
    return replace(
        run,
        lora=lora,
        sha256=sha256,
        best_lora=best if run.best and best.exists() else None,
        seconds=seconds,
        timed_steps=None if seconds is None else run.steps - start,
        warnings=[warning for warning in warnings if warning],
    )


def _read_settings(path: Path) -> dict[str, object]:
    with suppress(OSError, ValueError):
        settings = parse_yaml(read_text(path))
        return settings if isinstance(settings, dict) else {}
    return {}


def _read_curve(path: Path, column: str) -> Curve:
    """Read one column of a training's table; a line that is still being written is left out."""
    try:
        table = pandas.read_csv(path, on_bad_lines="skip", float_precision="round_trip")[["step", column]]
    except (KeyError, ValueError):  # an empty file, or none of a training's
        return []
    table = table.apply(pandas.to_numeric, errors="coerce").dropna(subset="step")
    return [(int(step), float(value)) for step, value in table.itertuples(index=False)]


def _what_became(root: Path, folder: Path, steps: int) -> str:
    """Say in a few words why there is no result."""
    if not _read_settings(folder / RESOLVED):
        return f"not trained: no settings in {folder / RESOLVED}"
    logs = root / "results/logs"
    if (logs / f"check_lora/{folder.name}.failed").exists():
        return "failed: its LoRA did not pass the check"
    with suppress(OSError):
        text = (logs / f"train/{folder.name}.failed").read_text(encoding="utf-8", errors="replace")
        return f"{'stopped' if GOES_ON in text else 'failed'}{f' after step {steps}' if steps else ''}"
    return f"not finished, at step {steps}" if steps else "not trained"


def _time(run: Run) -> tuple[float | None, int]:
    """Return the seconds of the last session and the step that it started after; None where it only looked."""
    start = 0
    with suppress(OSError):
        log = (run.root / f"results/logs/train/{run.key}.log").read_text(encoding="utf-8", errors="replace")
        if ALREADY_FINISHED in log:
            return None, start
        start = max(map(int, re.findall(rf"{WENT_ON} (\d+)", log)), default=0)
    try:
        table = pandas.read_csv(run.root / f"results/benchmarks/train/{run.key}.tsv", sep="\t")
        return float(table["s"].iloc[-1]), start
    except (OSError, ValueError, LookupError):  # trained without Snakemake
        return None, start


def _other_settings(run: Run, lora: Path) -> str | None:
    """Say which settings changed since the LoRA was trained, by what its own metadata tells."""
    try:
        own = parse_json(read_header(lora).metadata.get(f"{PREFIX}settings", "{}"))
    except (ContainerError, ValueError) as error:
        return f"{run.name}: {lora}: {error}"
    now = {key: last_name(value) if key in PATHS else value for key, value in run.settings.items()}
    changed = [
        f"{key} {value_text(value) or 'not set'}" for key, value in own.items() if key in now and now[key] != value
    ]
    if not changed:
        return None
    return f"{run.name}: its LoRA was trained with other settings than it has now: {', '.join(changed)}"
