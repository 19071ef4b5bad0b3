"""The training, from settings to the LoRA's file. `train` is the whole story, `_run` the loop in its visible order."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from qwen_image.dataset.config import DatasetSettings, load_dataset_config
from qwen_image.problems import InputError, Problem
from qwen_image.training import preparation
from qwen_image.training.adapter import effective_alpha, trainable_parameters
from qwen_image.training.batches import Step, training_steps
from qwen_image.training.flow import flow_loss, noisy_latents, predict_velocity
from qwen_image.training.items import TrainingItem, check_cache_files, join_manifests
from qwen_image.training.key_values import target_patterns
from qwen_image.training.loading import CachedBatches, LoadedBatch, make_loader, worker_count
from qwen_image.training.logger import Logger, NoLogger, StepRecord
from qwen_image.training.lora_file import (
    epoch_file_name,
    lora_tensors,
    outdated_epoch,
    outdated_step,
    save_lora,
    step_file_name,
)
from qwen_image.training.metadata import RunFacts, progress_metadata, run_metadata
from qwen_image.training.preparation import Plan
from qwen_image.training.randomness import derived_seed
from qwen_image.training.schedule import learning_rate

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import QwenImageTransformer2DModel

    from qwen_image.training.arguments import Settings

log = logging.getLogger(__name__)


def train(settings: Settings) -> Path:
    """Train a LoRA and return its file, which is written last of all.

    Raises InputError for bad data, a cache that does not fit, or a loss that is no longer a number.
    """
    accelerator = preparation.make_accelerator(settings)
    try:
        run = prepare(settings, accelerator)
        logger = Logger(settings) if accelerator.is_main_process else NoLogger()
        with contextlib.closing(logger), logging_redirect_tqdm():
            _run(run, logger)
        path = Path(settings.output_dir) / f"{settings.output_name}.safetensors"
        _save(run, path)
        log.info(
            "train: wrote %s after %d steps (%d epochs), average loss %.4f",
            path, run.step, run.epoch, run.average_loss,
        )  # fmt: skip
        return path
    finally:
        accelerator.end_training()


def _run(run: TrainingRun, logger: Logger | NoLogger) -> None:
    settings, accelerator = run.settings, run.accelerator
    batches = iter(_make_loader(run))
    bar = tqdm(
        total=run.plan.total_steps, desc="train", unit="step", file=sys.stderr, disable=not accelerator.is_main_process
    )
    with bar:
        for step in _steps(run):
            rate = _learning_rate(run, step)
            for group in run.optimizer.param_groups:
                group["lr"] = rate

            loss = _accumulate(run, step, batches)
            # without a limit the norm is still measured
            grad_norm = accelerator.clip_grad_norm_(run.parameters, settings.max_grad_norm or math.inf).item()
            mean_loss = accelerator.reduce(loss, "mean").item()
            if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
                raise _not_finite(run, step, loss.item(), grad_norm)

            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)

            run.step, run.epoch = step.number, step.epoch
            run.recent_losses.append(mean_loss)
            logger.log(
                StepRecord(
                    step=run.step,
                    epoch=run.epoch,
                    loss=mean_loss,
                    loss_average=run.average_loss,
                    learning_rate=rate,
                    grad_norm=grad_norm,
                )
            )
            bar.set_postfix(loss=f"{mean_loss:.4f}", average=f"{run.average_loss:.4f}", refresh=False)
            bar.update()
            _save_if_due(run, step)


def _accumulate(run: TrainingRun, step: Step, batches: Iterator[LoadedBatch | InputError]) -> torch.Tensor:
    """Add up the gradients of the step's batches; returns this process's mean loss."""
    total = torch.zeros((), device=run.accelerator.device)
    for batch in step.batches:
        loaded = next(batches)
        if isinstance(loaded, InputError):
            raise loaded
        # dropout draws from the global generator
        rank = run.accelerator.process_index
        torch.manual_seed(derived_seed("dropout", run.settings.seed, batch.epoch, batch.position, rank))
        # processes exchange gradients once a step, with its last batch
        last = batch is step.batches[-1]
        with contextlib.nullcontext() if last else run.accelerator.no_sync(run.model):
            loss = batch_loss(run.model, loaded.to(run.accelerator.device), text_dtype=run.transformer.dtype)
            run.accelerator.backward(loss / len(step.batches))
        total += loss.detach() / len(step.batches)
    return total


def batch_loss(model: torch.nn.Module, batch: LoadedBatch, *, text_dtype: torch.dtype) -> torch.Tensor:
    """Return the flow-matching loss of one batch, a float32 scalar."""
    z_bc1hw = noisy_latents(batch.latents_bc1hw, batch.noise_bc1hw, batch.t_b)
    velocity_bc1hw = predict_velocity(model, z_bc1hw, batch.t_b, batch.text_bld.to(text_dtype), batch.mask_bl)
    return flow_loss(velocity_bc1hw, batch.latents_bc1hw, batch.noise_bc1hw)


def _save_if_due(run: TrainingRun, step: Step) -> None:
    """Write the files in between; older ones go only once the newer is complete."""
    settings, name = run.settings, run.settings.output_name
    folder = Path(settings.output_dir)
    if settings.save_every_n_steps and step.number % settings.save_every_n_steps == 0:
        _save(run, folder / step_file_name(name, step.number))
        old = outdated_step(step.number, every=settings.save_every_n_steps, keep=settings.save_last_n_steps)
        _remove(run, old and folder / step_file_name(name, old))
    if step.ends_epoch and settings.save_every_n_epochs and step.epoch % settings.save_every_n_epochs == 0:
        if step.epoch == run.plan.epochs:
            return  # the final file is this epoch's
        _save(run, folder / epoch_file_name(name, step.epoch))
        old = outdated_epoch(step.epoch, every=settings.save_every_n_epochs, keep=settings.save_last_n_epochs)
        _remove(run, old and folder / epoch_file_name(name, old))


def _save(run: TrainingRun, path: Path) -> None:
    if run.accelerator.is_main_process:
        metadata = {**run.metadata, **progress_metadata(run.settings, step=run.step, epoch=run.epoch)}
        save_lora(path, lora_tensors(run.transformer, precision=run.settings.save_precision), metadata)


def _remove(run: TrainingRun, path: Path | None) -> None:
    if path is not None and run.accelerator.is_main_process:
        path.unlink(missing_ok=True)


def _steps(run: TrainingRun) -> Iterator[Step]:
    return training_steps(
        run.items,
        run.datasets,
        seed=run.settings.seed,
        accumulation=run.settings.gradient_accumulation_steps,
        total=run.plan.total_steps,
        rank=run.accelerator.process_index,
        processes=run.accelerator.num_processes,
    )


def _make_loader(run: TrainingRun):
    settings, accelerator = run.settings, run.accelerator
    return make_loader(
        (batch for step in _steps(run) for batch in step.batches),
        CachedBatches(run.items, preparation.noise_settings(settings)),
        workers=_workers(run),
        pin_memory=accelerator.device.type == "cuda",
        persistent=settings.persistent_data_loader_workers,
    )


def _workers(run: TrainingRun) -> int:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return worker_count(run.settings.max_data_loader_n_workers, processes_here=here)


def _learning_rate(run: TrainingRun, step: Step) -> float:
    settings, plan = run.settings, run.plan
    return learning_rate(
        step.number - 1,
        peak=settings.learning_rate,
        law=settings.lr_scheduler,
        warmup=plan.warmup_steps,
        total=plan.total_steps,
        cycles=settings.lr_scheduler_num_cycles,
        power=settings.lr_scheduler_power,
    )


def _not_finite(run: TrainingRun, step: Step, local_loss: float, grad_norm: float) -> InputError:
    """Return the error that names the items of the step, of all processes whose own loss is bad (or of all)."""
    from accelerate.utils import gather_object

    items = [run.items[index] for batch in step.batches for index, _ in batch.draws]
    mine = [(math.isfinite(local_loss), item.latents.path, item.name) for item in items]
    everyone = gather_object(mine)
    bad = [entry for entry in everyone if not entry[0]] or everyone
    found = f"the loss or its gradient was no number at step {step.number} (gradient norm {grad_norm})"
    mend = "lower learning_rate; if it is always this item, look at its picture and caption and cache it again"
    return InputError([Problem(file=path, key=name, found=found, mend=mend) for _, path, name in sorted(set(bad))])
