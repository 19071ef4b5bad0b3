"""Where a training's numbers go: CSV tables always, TensorBoard and wandb when asked for. One object for all."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_image.training.tables import Table
from qwen_image.training.trackers import open_trackers

if TYPE_CHECKING:
    from qwen_image.training.arguments import Settings
    from qwen_image.training.trackers import Tracker

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step's numbers, over all processes. The CSV's columns, in this order."""

    step: int
    epoch: int
    loss: float
    loss_average: float
    """Mean over the last epoch's worth of steps."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    skipped_steps: int = 0
    """So far: those whose loss or gradient was no number."""


class NoLogger:
    """Logs nothing: what every process but the first one has."""

    def log(self, record: StepRecord, seconds: float) -> None:
        """Do nothing."""

    def validation(self, step: int, loss: float) -> None:
        """Do nothing."""

    def pictures(self, step: int, paths: Sequence[Path]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Logger:
    """Writes each step to the loss table, each validation to another, and both to the trackers."""

    def __init__(
        self,
        settings: Settings,
        *,
        start_step: int,
        average_loss: float | None = None,
        best_validation: float | None = None,
    ) -> None:
        """Go on after `start_step`, with the rows of the steps up to it that an earlier run of this training left.

        The average loss of that step and the lowest validation loss so far tell whether they are this training's.
        Raises InputError when a tracker cannot start.
        """
        folder, name = Path(settings.output_dir), settings.output_name
        # first of all, because this is what may fail
        self._trackers = open_trackers(settings, start_step=start_step)

        def same_average(rows: list[dict[str, str]]) -> bool:
            whole = int(rows[-1]["step"]) == start_step
            return not whole or average_loss is None or rows[-1]["loss_average"] == str(average_loss)

        def same_best(rows: list[dict[str, str]]) -> bool:
            losses = [float(row["loss"]) for row in rows]
            return min(filter(math.isfinite, losses), default=None) == best_validation

        columns = [field.name for field in fields(StepRecord)]
        self._losses = Table(folder / loss_table_name(name), columns, start_step=start_step, belongs=same_average)
        self._validations = None
        if settings.validation_split:
            path = folder / validation_table_name(name)
            self._validations = Table(path, ["step", "loss"], start_step=start_step, belongs=same_best)
        if missing := start_step - self._losses.kept_rows:
            log.warning("train: %s lacks %d of the first %d steps", loss_table_name(name), missing, start_step)

    def log(self, record: StepRecord, seconds: float) -> None:
        """Write one step, which took so many seconds. No time goes into the table: equal trainings give equal ones."""
        self._losses.write(asdict(record))
        # the field's names, so that old and new runs share their charts
        self._show(record.step, {
            "loss/current": record.loss,
            "loss/average": record.loss_average,
            "lr/unet": record.learning_rate,
            "grad_norm": record.grad_norm,
            "skipped_steps": record.skipped_steps,
            "time/step_seconds": seconds,
        })  # fmt: skip

    def validation(self, step: int, loss: float) -> None:
        """Write the held-out items' loss after a step."""
        assert self._validations is not None, "nothing is held out"
        self._validations.write({"step": step, "loss": loss})
        self._show(step, {"loss/validation": loss})

    def pictures(self, step: int, paths: Sequence[Path]) -> None:
        """Show sample pictures, each prompt's under its own number."""
        self._tell(lambda tracker: tracker.pictures(step, paths))

    def close(self) -> None:
        """Finish the tables, also of a training that failed: they show what happened."""
        with contextlib.ExitStack() as stack:
            for part in (self._losses, self._validations, *self._trackers):
                if part is not None:
                    stack.callback(part.close)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        # a chart shows a gap where a value is no number
        numbers = {name: value for name, value in values.items() if math.isfinite(value)}
        self._tell(lambda tracker: tracker.numbers(step, numbers))

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        """Tell every tracker. One that fails is told nothing more: its charts are not worth the training."""
        for tracker in list(self._trackers):
            try:
                what(tracker)
            except Exception as error:  # a full disk, a lost connection, whatever its library may raise
                log.warning("train: %s failed and is left out from here on: %s", type(tracker).__name__, error)
                self._trackers.remove(tracker)


def loss_table_name(output_name: str) -> str:
    """Name of the CSV beside the LoRA."""
    return f"{output_name}.loss.csv"


def validation_table_name(output_name: str) -> str:
    """Name of the CSV of the held-out items' loss."""
    return f"{output_name}.validation.csv"
