"""The training, from settings to the LoRA's file. `train` is the whole story, `_run` the loop in its visible order."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from qwen_image.adapter.norms import limit_weight_norms
from qwen_image.device import deterministic_algorithms
from qwen_image.problems import InputError
from qwen_image.sampling.pictures import SamplePictures
from qwen_image.training.batches import Step, training_steps
from qwen_image.training.captions import CaptionChoice, empty_caption
from qwen_image.training.flow import flow_loss, noisy_latents, predict_velocity
from qwen_image.training.hub import Uploader, upload_what_is_left
from qwen_image.training.interruption import STATE_IS_SAVED, Interruption, job_deadline
from qwen_image.training.loading import CachedBatches, LoadedBatch, make_loader, worker_count
from qwen_image.training.logger import Logger, NoLogger, StepRecord
from qwen_image.training.noise_levels import NoiseLevels
from qwen_image.training.optimizers import check_optimizer, set_learning_rate
from qwen_image.training.ownership import NoOwnership, Ownership, owned
from qwen_image.training.preparation import make_accelerator, make_plan, origin_of, prepare, read_data
from qwen_image.training.randomness import derived_seed
from qwen_image.training.run import TrainingRun
from qwen_image.training.saving import Saver, is_finished, tidy_up
from qwen_image.training.starting import starting_point
from qwen_image.training.trouble import skip_or_stop
from qwen_image.training.validation import validation_loss
from qwen_image.training.watchdog import StepWatch, memory_facts

if TYPE_CHECKING:
    from qwen_image.training.arguments import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Helpers:
    """What the loop hands each step to, beside the weights."""

    logger: Logger | NoLogger
    saver: Saver
    pictures: SamplePictures
    watch: StepWatch
    interruption: Interruption
    ownership: Ownership | NoOwnership


def train(settings: Settings) -> Path | None:
    """Train a LoRA and return its file, which is written last of all; None when it stopped to go on later.

    What was done before counts: a finished training does nothing, a stopped one goes on. Raises InputError for bad
    data, a cache that does not fit, too many steps without a loss, or another training that writes the same files.
    """
    with contextlib.ExitStack() as until_end:
        return _train(settings, until_end)


def _train(settings: Settings, until_end: contextlib.ExitStack) -> Path | None:
    deadline = job_deadline(settings.stop_before)
    if settings.stop_before is not None and deadline is None:
        log.warning("train: stop_before changes nothing: no SLURM job tells when it ends (SLURM_JOB_END_TIME)")
    interruption = Interruption(deadline)
    if settings.stop_before is not None and interruption.reason():
        log.warning(
            "train: the job ends in less than the %g minutes of stop_before; this turn does a single step. "
            "Lower stop_before, or ask for a longer job (runtime)", settings.stop_before,
        )  # fmt: skip
    with interruption.listening():
        accelerator = make_accelerator(settings)
        check_optimizer(settings, accelerator.device)
        data = read_data(settings)
        origin = origin_of(settings, accelerator)
        ownership = until_end.enter_context(owned(settings, accelerator, interruption.reason))
        if ownership is None:
            return None
        if is_finished(settings, origin):
            path = tidy_up(settings, accelerator)
            upload_what_is_left(settings)
            return path
        plan = make_plan(settings, data.items, data.datasets, processes=accelerator.num_processes)
        saved = starting_point(settings, accelerator, origin, plan.total_steps)
        # both find out what is missing; the model, which takes longest, is loaded after them
        uploader, pictures = Uploader(settings), SamplePictures(settings, accelerator.device)
        run = prepare(settings, accelerator, data, plan, origin, saved)
        ownership.check()
        logger = _open_logger(run)
        helpers = Helpers(
            logger=logger,
            saver=Saver(run, uploader, ownership),
            pictures=pictures,
            watch=StepWatch(lambda: memory_facts(accelerator.device)),
            interruption=interruption,
            ownership=ownership,
        )
        with _finished_tables(helpers), logging_redirect_tqdm():
            stopped = _run(run, helpers)
        path = None if stopped else helpers.saver.finish()
        _report(run, path, stopped)
        # a launcher ends all processes as soon as one leaves with another code than 0
        accelerator.wait_for_everyone()
    accelerator.end_training()
    for failure in pictures.failures:
        log.warning("train: %s", failure)
    uploader.finish()
    return path


def _open_logger(run: TrainingRun) -> Logger | NoLogger:
    if not run.accelerator.is_main_process:
        return NoLogger()
    progress = run.progress
    return Logger(
        run.settings,
        start_step=progress.step,
        average_loss=progress.average_loss,
        best_validation=progress.best_validation,
    )


@contextlib.contextmanager
def _finished_tables(helpers: Helpers) -> Iterator[None]:
    """Finish the tables of a training, also of one that fails, unless they are another's by then."""
    try:
        yield
    finally:
        helpers.ownership.check()
        helpers.logger.close()


def batch_loss(run: TrainingRun, batch: LoadedBatch) -> torch.Tensor:
    """Return the flow-matching loss of one batch, a float32 scalar."""
    settings = run.settings
    z_bc1hw = noisy_latents(batch.latents_bc1hw, batch.noise_bc1hw, batch.t_b)
    text_bld = batch.text_bld.to(run.transformer.txt_in.weight.dtype)
    velocity_bc1hw = predict_velocity(run.model, z_bc1hw, batch.t_b, text_bld, batch.mask_bl)
    return flow_loss(
        velocity_bc1hw, batch.latents_bc1hw, batch.noise_bc1hw, batch.weight_b,
        loss_type=settings.loss_type, huber_delta=settings.huber_delta,
    )  # fmt: skip


def _run(run: TrainingRun, helpers: Helpers) -> str | None:
    """Train to the end, or until there is a reason to stop, which is returned once the state is saved."""
    settings, accelerator, progress = run.settings, run.accelerator, run.progress
    batches = load_batches(run)
    bar = tqdm(
        total=run.plan.total_steps, initial=progress.step, desc="train", unit="step", file=sys.stderr,
        disable=not accelerator.is_main_process,
    )  # fmt: skip
    with bar:
        if settings.sample_at_first and progress.step == 0 and not _anybody_stops(run, helpers):
            _sample(run, helpers, None)
        for step in _steps(run):
            start = time.monotonic()
            rate = run.schedule.rate(step.number - 1)
            set_learning_rate(run.optimizer, rate)

            loss = _accumulate(run, step, batches)
            # the step's one wait for the device; without a limit the norm is still measured
            grad_norm = accelerator.clip_grad_norm_(run.parameters, settings.max_grad_norm or math.inf).item()
            stop = helpers.interruption.reason()
            mean_loss, stopping = _agree(run, loss, stop is not None)

            progress.step, progress.epoch = step.number, step.epoch
            if math.isfinite(mean_loss) and math.isfinite(grad_norm):
                run.optimizer.step()
                _after_update(run)
                progress.recent_losses.append(mean_loss)
            else:
                skip_or_stop(run, step, loss.item(), grad_norm)
            run.optimizer.zero_grad(set_to_none=True)

            seconds = time.monotonic() - start
            helpers.ownership.check()
            helpers.logger.log(_record(run, mean_loss, rate, grad_norm), seconds)
            bar.set_postfix(loss=f"{mean_loss:.4f}", average=f"{progress.average_loss:.4f}", refresh=False)
            bar.update()
            if warning := helpers.watch.note(seconds, _shape(run, step)):
                log.warning("train: step %d: %s", step.number, warning)

            _validate(run, helpers, step)
            helpers.saver.save_if_due(step)
            _sample(run, helpers, step)
            if stopping and step.number < run.plan.total_steps:
                helpers.saver.save_passing_state()
                return stop or "another process was asked to stop"
    return None


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
        with (
            contextlib.nullcontext() if exchange else accelerator.no_sync(run.model),
            # attention's gradients are otherwise added up in the order in which a GPU's processors finish
            deterministic_algorithms(accelerator.device.type),
        ):
            loss = batch_loss(run, loaded) / len(step.batches)
            accelerator.backward(loss)
        total += loss.detach()
    return total


def _agree(run: TrainingRun, loss: torch.Tensor, stop: bool) -> tuple[float, bool]:
    """Return the mean loss of all processes, and whether any of them wants to stop: all then do."""
    own = torch.stack([loss.float(), torch.full_like(loss, float(stop), dtype=torch.float32)])
    mean_loss, stopping = run.accelerator.reduce(own, "mean").tolist()
    return mean_loss, stopping > 0


def _anybody_stops(run: TrainingRun, helpers: Helpers) -> bool:
    own = torch.tensor(float(helpers.interruption.reason() is not None), device=run.accelerator.device)
    return run.accelerator.reduce(own, "mean").item() > 0


def _after_update(run: TrainingRun) -> None:
    if run.settings.scale_weight_norms is not None:
        limit_weight_norms(run.transformer, run.settings.scale_weight_norms)
    if run.average is not None:
        run.average.update()


def _validate(run: TrainingRun, helpers: Helpers, step: Step) -> None:
    settings, progress = run.settings, run.progress
    if not run.held_out:
        return
    steps, epochs = settings.validate_every_n_steps, settings.validate_every_n_epochs
    if steps is None and epochs is None:
        epochs = 1
    due = bool(steps and step.number % steps == 0) or bool(epochs and step.ends_epoch and step.epoch % epochs == 0)
    if not due and step.number < run.plan.total_steps:
        return
    with run.kept_weights():
        loss = validation_loss(run)
        helpers.ownership.check()
        helpers.logger.validation(step.number, loss)
        log.info("train: step %d: validation loss %.4f", step.number, loss)
        best = progress.best_validation
        if math.isfinite(loss) and (best is None or loss < best):
            progress.best_validation = loss
            helpers.saver.save_best()


def _sample(run: TrainingRun, helpers: Helpers, step: Step | None) -> None:
    """Make the sample pictures that are due after a step, or before the first one. The first process makes them."""
    if step is not None and not helpers.pictures.due(step, last=step.number == run.plan.total_steps):
        return
    number, epoch = (step.number, step.epoch if step.ends_epoch else None) if step is not None else (0, None)
    if run.accelerator.is_main_process:
        helpers.ownership.check()
        with run.kept_weights():
            paths = helpers.pictures.make(run.transformer, step=number, epoch=epoch)
        helpers.logger.pictures(number, paths)
    run.accelerator.wait_for_everyone()


def _record(run: TrainingRun, loss: float, rate: float, grad_norm: float) -> StepRecord:
    return StepRecord(
        step=run.progress.step,
        epoch=run.progress.epoch,
        loss=loss,
        loss_average=run.progress.average_loss,
        learning_rate=rate,
        grad_norm=grad_norm,
        skipped_steps=run.progress.skipped_steps,
    )


def _shape(run: TrainingRun, step: Step) -> tuple:
    """What must be equal for two steps to take as long."""
    return tuple(sorted((run.items[batch.draws[0].item].bucket, len(batch.draws)) for batch in step.batches))


def load_batches(run: TrainingRun) -> Iterator[LoadedBatch]:
    """Yield this process's batches of the whole training; the workers that read them live as long."""
    settings = run.settings
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    loader = make_loader(
        (batch for step in _steps(run) for batch in step.batches),
        CachedBatches(
            run.items,
            NoiseLevels(settings, run.items, run.datasets),
            CaptionChoice(settings, empty_caption(settings)),
            seed=settings.seed,
        ),
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
        done=run.progress.step,
        rank=run.accelerator.process_index,
        processes=run.accelerator.num_processes,
    )


def _report(run: TrainingRun, path: Path | None, stopped: str | None) -> None:
    progress = run.progress
    if path is None:
        log.info("train: stopped after step %d of %d: %s", progress.step, run.plan.total_steps, stopped)
        anew = run.settings.resume == "none"
        saved = "its state is saved; without resume: none it is gone on from" if anew else STATE_IS_SAVED
        log.info("train: %s", saved)
        return
    log.info(
        "train: wrote %s after %d steps (%d epochs), average loss %.4f",
        path, progress.step, progress.epoch, progress.average_loss,
    )  # fmt: skip
