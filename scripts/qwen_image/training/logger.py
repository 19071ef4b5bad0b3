"""Where a training's numbers go: a CSV table always, TensorBoard when a folder is given. One object for both."""

from __future__ import annotations

import csv
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_image.training.arguments import Settings

DEFAULT_TRACKER = "network_train"


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


class NoLogger:
    """Logs nothing: what every process but the first one has."""

    def log(self, record: StepRecord) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Logger:
    """Writes each step to the table and, if asked to, to TensorBoard."""

    def __init__(self, settings: Settings) -> None:
        self._final = Path(settings.output_dir) / loss_table_name(settings.output_name)
        self._final.parent.mkdir(parents=True, exist_ok=True)
        # grows under this name, one whole line a step, so that it can be watched; the last name is given at the end
        self._partial = self._final.with_name(f"{self._final.name}.part")
        self._stream = open(self._partial, "w", encoding="utf-8", newline="", buffering=1)  # noqa: SIM115
        self._rows = csv.DictWriter(self._stream, [field.name for field in fields(StepRecord)], lineterminator="\n")
        self._rows.writeheader()
        self._board = _open_tensorboard(settings) if settings.logging_dir is not None else None

    def log(self, record: StepRecord) -> None:
        """Write one step."""
        self._rows.writerow(asdict(record))
        if self._board is not None:
            # the field's names, so that old and new runs share their charts
            self._board.add_scalar("loss/current", record.loss, record.step)
            self._board.add_scalar("loss/average", record.loss_average, record.step)
            self._board.add_scalar("lr/unet", record.learning_rate, record.step)
            self._board.add_scalar("grad_norm", record.grad_norm, record.step)

    def close(self) -> None:
        """Finish the table, also of a training that failed: it shows what happened."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        os.replace(self._partial, self._final)
        if self._board is not None:
            self._board.close()


def loss_table_name(output_name: str) -> str:
    """Name of the CSV beside the LoRA."""
    return f"{output_name}.loss.csv"


def _open_tensorboard(settings: Settings):
    from torch.utils.tensorboard import SummaryWriter

    run = f"{settings.log_prefix or ''}{settings.output_name}"
    folder = Path(settings.logging_dir) / run / (settings.log_tracker_name or DEFAULT_TRACKER)
    # a run of the same name before this one is hidden in the charts, not mixed in
    board = SummaryWriter(str(folder), purge_step=0)
    if settings.log_config:
        lines = [f"    {key} = {value!r}" for key, value in settings.as_dict().items()]
        board.add_text("config", "\n".join(lines))
    return board
