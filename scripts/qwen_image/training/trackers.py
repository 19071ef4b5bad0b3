"""The tools that draw a training's curves: TensorBoard and Weights & Biases, behind one interface.

Secrets come from the environment (WANDB_API_KEY) and are never read here, so no log can hold one.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qwen_image.bounded import parse_toml, read_text
from qwen_image.problems import InputError, Problem

if TYPE_CHECKING:
    from qwen_image.training.arguments import Settings

log = logging.getLogger(__name__)
DEFAULT_NAME = "network_train"
FINISH_SECONDS = 60
"""How long a training's end waits for wandb to send what is left, before the LoRA is written; wandb itself would wait
for ever. ``wandb sync`` sends it later."""
OPTIONS: dict[str, tuple[str, ...]] = {
    "wandb": (
        "entity", "project", "dir", "id", "name", "notes", "tags", "group", "job_type", "mode", "resume",
        "resume_from", "fork_from", "save_code", "reinit", "force",
    ),
    "tensorboard": ("max_queue", "flush_secs", "filename_suffix"),
}  # fmt: skip
"""What a table of log_tracker_config may set, by tracker: arguments of ``wandb.init`` and of SummaryWriter."""


class Tracker(Protocol):
    """One tool. Steps count from 1; 0 is before the first one."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers by their name."""

    def pictures(self, step: int, paths: Sequence[Path]) -> None:
        """Show pictures, the first of each call in one row, the second in another."""

    def close(self) -> None:
        """Write what is left."""


def trackers_of(settings: Mapping[str, object]) -> tuple[str, ...]:
    """Return the tools that the settings ask for. A logging_dir by itself asks for TensorBoard."""
    chosen = settings["log_with"] or ("tensorboard" if settings["logging_dir"] is not None else None)
    return {None: (), "all": ("tensorboard", "wandb")}.get(chosen, (chosen,))


def open_trackers(settings: Settings, *, start_step: int) -> list[Tracker]:
    """Start the tools. What an earlier run showed of steps after `start_step` is hidden. Raises InputError."""
    options = tracker_options(settings.log_tracker_config)
    makers = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    return [
        makers[name](settings, options.get(name, {}), start_step=start_step) for name in trackers_of(settings.as_dict())
    ]


def check_trackers(settings: Mapping[str, object]) -> list[Problem]:
    """Return what would keep the tools from starting, as far as it shows without starting them."""
    problems = []
    if "wandb" in trackers_of(settings) and importlib.util.find_spec("wandb") is None:
        mend = "install it (pip install -r requirements.txt), or set log_with: tensorboard"
        problems.append(Problem(file="settings", key="log_with", found="wandb is not installed", mend=mend))
    try:
        options = tracker_options(settings["log_tracker_config"])
    except InputError as error:
        return problems + error.problems
    unused = [name for name in options if name not in trackers_of(settings)]
    for name in unused:
        mend = "remove the table, or have log_with name this tool"
        file = str(settings["log_tracker_config"])
        problems.append(Problem(file=file, key=name, found="is not what log_with asks for", mend=mend))
    return problems


def tracker_options(path: str | None) -> dict[str, dict[str, object]]:
    """Return the tables of a log_tracker_config by tool. Raises InputError with all that is wrong in it."""
    if path is None:
        return {}
    try:
        tables = parse_toml(read_text(path))
    except OSError as error:
        problem = Problem(file=path, found=f"cannot be read ({error.strerror})", mend="give an existing TOML file")
        raise InputError([problem]) from error
    except ValueError as error:
        problem = Problem(file=path, found=f"is no TOML file ({error})", mend="mend the line it names")
        raise InputError([problem]) from error
    problems = []
    for name, table in tables.items():
        if name not in OPTIONS or not isinstance(table, dict):
            mend = f"put settings below [{'] or ['.join(OPTIONS)}]"
            problems.append(Problem(file=path, key=name, found="is no table of a logging tool", mend=mend))
            continue
        for key in table.keys() - set(OPTIONS[name]):
            mend = f"remove it; the file may set {', '.join(OPTIONS[name])}"
            problems.append(Problem(file=path, key=f"{name}.{key}", found="is no setting to give here", mend=mend))
    if problems:
        raise InputError(sorted(problems, key=lambda problem: problem.key))
    return tables


class TensorBoard:
    """Curves and pictures as files below logging_dir, to be read with ``tensorboard --logdir``."""

    def __init__(self, settings: Settings, options: Mapping[str, object], *, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(settings.logging_dir) / _run_name(settings) / (settings.log_tracker_name or DEFAULT_NAME)
        # what an earlier run of this name wrote of later steps is hidden in the charts, not mixed in
        self._board = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else 0, **options)
        if settings.log_config:
            lines = [f"    {key} = {value!r}" for key, value in settings.as_dict().items()]
            self._board.add_text("config", "\n".join(lines), start_step)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers by their name."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def pictures(self, step: int, paths: Sequence[Path]) -> None:
        """Show pictures in rows."""
        import numpy
        from PIL import Image

        for name, path in _rows(paths):
            with Image.open(path) as picture:
                self._board.add_image(name, numpy.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self._board.close()


class WeightsAndBiases:
    """A run at wandb, or with WANDB_MODE=offline one in a folder, to be sent later with ``wandb sync``.

    A training that goes on makes another run of the same group.
    """

    def __init__(self, settings: Settings, options: Mapping[str, object], *, start_step: int) -> None:
        # its makers are sent no reports of errors, unless the user wants that
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        folder = Path(settings.logging_dir or settings.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        given = {
            "project": settings.log_tracker_name or DEFAULT_NAME,
            "name": settings.wandb_run_name or _run_name(settings),
            "group": settings.output_name,
            "dir": str(folder),
            "config": settings.as_dict() if settings.log_config else None,
        }
        try:
            # the terminal keeps its progress bar, and the log is this program's own
            own = wandb.Settings(console="off", silent=True, finish_timeout=FINISH_SECONDS)
            self._run = wandb.init(**given | options, settings=own)
        except (wandb.Error, TypeError, ValueError) as error:
            mend = "set WANDB_API_KEY in the environment, or WANDB_MODE=offline; or set log_with: tensorboard"
            problem = Problem(file="wandb", key="log_with", found=f"cannot start ({error})", mend=mend)
            raise InputError([problem]) from error
        log.info("train: wandb keeps this run at %s", self._run.dir if self._run.offline else self._run.url)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers by their name."""
        self._run.log(dict(values), step=step)

    def pictures(self, step: int, paths: Sequence[Path]) -> None:
        """Show pictures in rows."""
        import wandb

        self._run.log({name: wandb.Image(str(path)) for name, path in _rows(paths)}, step=step)

    def close(self) -> None:
        """Write what is left. Called on the way out of an error, it marks the run as failed."""
        self._run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)


def _run_name(settings: Settings) -> str:
    return f"{settings.log_prefix or ''}{settings.output_name}"


def _rows(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    return [(f"samples/{number:02d}", path) for number, path in enumerate(paths)]
