"""Which files a training writes and when, and which older ones go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwen_image.adapter.files import lora_tensors, save_lora
from qwen_image.training.batches import Step
from qwen_image.training.metadata import progress_metadata

if TYPE_CHECKING:
    from qwen_image.training.preparation import TrainingRun


def save_final(run: TrainingRun) -> Path:
    """Write the trained LoRA and return its path."""
    path = Path(run.settings.output_dir) / f"{run.settings.output_name}.safetensors"
    _save(run, path)
    return path


def save_if_due(run: TrainingRun, step: Step) -> None:
    """Write the files in between that are due after this step; older ones go only once the newer is complete."""
    settings, name = run.settings, run.settings.output_name
    folder = Path(settings.output_dir)
    every = settings.save_every_n_steps
    if every and step.number % every == 0:
        _save(run, folder / step_file_name(name, step.number))
        old = outdated_step(step.number, every=every, keep=settings.save_last_n_steps)
        _remove(run, old and folder / step_file_name(name, old))
    every = settings.save_every_n_epochs
    # the last epoch's file is the final one
    if every and step.ends_epoch and step.epoch % every == 0 and step.epoch < run.plan.epochs:
        _save(run, folder / epoch_file_name(name, step.epoch))
        old = outdated_epoch(step.epoch, every=every, keep=settings.save_last_n_epochs)
        _remove(run, old and folder / epoch_file_name(name, old))


def epoch_file_name(output_name: str, epoch: int) -> str:
    """Name of the file saved after an epoch, counted from 1."""
    return f"{output_name}-{epoch:06d}.safetensors"


def step_file_name(output_name: str, step: int) -> str:
    """Name of the file saved after an optimizer step, counted from 1."""
    return f"{output_name}-step{step:08d}.safetensors"


def outdated_epoch(epoch: int, *, every: int, keep: int | None) -> int | None:
    """Return the epoch whose file may go once this epoch's is written, if there is one. `keep` counts files."""
    old = epoch - every * keep if keep else 0
    return old if old > 0 else None


def outdated_step(step: int, *, every: int, keep: int | None) -> int | None:
    """Return the step whose file may go once this step's is written, if there is one. `keep` counts steps."""
    newest_old = step - keep - 1 if keep else 0
    old = newest_old - newest_old % every
    return old if old > 0 else None


def _save(run: TrainingRun, path: Path) -> None:
    if run.accelerator.is_main_process:
        metadata = {**run.metadata, **progress_metadata(run.settings, step=run.step, epoch=run.epoch)}
        save_lora(path, lora_tensors(run.transformer, precision=run.settings.save_precision), metadata)


def _remove(run: TrainingRun, path: Path | None) -> None:
    if path is not None and run.accelerator.is_main_process:
        path.unlink(missing_ok=True)
