"""The training, from settings to the LoRA's file. `train` is the whole story, `_run` the loop in its visible order."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from qwen_image.problems import InputError, Problem
from qwen_image.training.batches import Step, training_steps
from qwen_image.training.flow import flow_loss, noisy_latents, predict_velocity
from qwen_image.training.loading import CachedBatches, LoadedBatch, make_loader, worker_count
from qwen_image.training.logger import Logger, NoLogger, StepRecord
from qwen_image.training.preparation import TrainingRun, make_accelerator, noise_settings, prepare
from qwen_image.training.randomness import derived_seed
from qwen_image.training.saving import save_final, save_if_due
from qwen_image.training.schedule import learning_rate

if TYPE_CHECKING:
    from qwen_image.training.arguments import Settings

log = logging.getLogger(__name__)


def train(settings: Settings) -> Path:
    """Train a LoRA and return its file, which is written last of all.

    Raises InputError for bad data, a cache that does not fit, or a loss that is no longer a number.
    """
    accelerator = make_accelerator(settings)
    run = prepare(settings, accelerator)
    logger = Logger(settings) if accelerator.is_main_process else NoLogger()
    with contextlib.closing(logger), logging_redirect_tqdm():
        _run(run, logger)
    path = save_final(run)
    accelerator.end_training()
    log.info(
        "train: wrote %s after %d steps (%d epochs), average loss %.4f", path, run.step, run.epoch, run.average_loss
    )
    return path


def batch_loss(model: torch.nn.Module, batch: LoadedBatch, *, text_dtype: torch.dtype) -> torch.Tensor:
    """Return the flow-matching loss of one batch, a float32 scalar."""
    z_bc1hw = noisy_latents(batch.latents_bc1hw, batch.noise_bc1hw, batch.t_b)
    velocity_bc1hw = predict_velocity(model, z_bc1hw, batch.t_b, batch.text_bld.to(text_dtype), batch.mask_bl)
    return flow_loss(velocity_bc1hw, batch.latents_bc1hw, batch.noise_bc1hw)


def _run(run: TrainingRun, logger: Logger | NoLogger) -> None:
    settings, accelerator = run.settings, run.accelerator
    batches = _load_batches(run)
    bar = tqdm(
        total=run.plan.total_steps, desc="train", unit="step", file=sys.stderr, disable=not accelerator.is_main_process
    )
    with bar:
        for step in _steps(run):
            rate = _learning_rate(run, step)
            for group in run.optimizer.param_groups:
                group["lr"] = rate

            loss = _accumulate(run, step, batches)
            # the step's one wait for the device; without a limit the norm is still measured
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
            save_if_due(run, step)


def _accumulate(run: TrainingRun, step: Step, batches: Iterator[LoadedBatch]) -> torch.Tensor:
    """Add up the gradients of the step's batches; returns this process's mean loss."""
    accelerator = run.accelerator
    total = torch.zeros((), device=accelerator.device)
    for batch in step.batches:
        loaded = next(batches).to(accelerator.device)
        # dropout draws from the global generator
        torch.manual_seed(
            derived_seed("dropout", run.settings.seed, batch.epoch, batch.position, accelerator.process_index)
        )
        # processes exchange gradients once a step, with its last batch
        exchange = batch is step.batches[-1]
        with contextlib.nullcontext() if exchange else accelerator.no_sync(run.model):
            loss = batch_loss(run.model, loaded, text_dtype=run.transformer.txt_in.weight.dtype) / len(step.batches)
            accelerator.backward(loss)
        total += loss.detach()
    return total


def _load_batches(run: TrainingRun) -> Iterator[LoadedBatch]:
    """Yield this process's batches of the whole training; the workers that read them live as long."""
    settings = run.settings
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    loader = make_loader(
        (batch for step in _steps(run) for batch in step.batches),
        CachedBatches(run.items, noise_settings(settings)),
        workers=worker_count(settings.max_data_loader_n_workers, processes_here=processes_here),
        pin_memory=run.accelerator.device.type == "cuda",
        persistent=settings.persistent_data_loader_workers,
    )
    for loaded in loader:
        if isinstance(loaded, InputError):
            raise loaded
        yield loaded


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


def _learning_rate(run: TrainingRun, step: Step) -> float:
    settings = run.settings
    return learning_rate(
        step.number - 1,
        peak=settings.learning_rate,
        law=settings.lr_scheduler,
        warmup=run.plan.warmup_steps,
        total=run.plan.total_steps,
        cycles=settings.lr_scheduler_num_cycles,
        power=settings.lr_scheduler_power,
    )


def _not_finite(run: TrainingRun, step: Step, local_loss: float, grad_norm: float) -> InputError:
    """Return the error that names the step's items: those of processes whose own loss is bad, or else all."""
    from accelerate.utils import gather_object

    items = [run.items[index] for batch in step.batches for index, _ in batch.draws]
    everyone = gather_object([(math.isfinite(local_loss), item.latents.path, item.name) for item in items])
    suspects = [entry for entry in everyone if not entry[0]] or everyone
    found = f"the loss or its gradient was no number at step {step.number} (gradient norm {grad_norm})"
    mend = "lower learning_rate; if it is always this item, look at its picture and caption and cache it again"
    problems = [Problem(file=path, key=name, found=found, mend=mend) for _, path, name in sorted(set(suspects))]
    return InputError(problems)
