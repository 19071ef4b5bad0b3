"""Which files a training writes and when, and which older ones go."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from qwen_image.adapter.files import adapter_tensors, files_of, save_adapter
from qwen_image.container import ContainerError, read_header
from qwen_image.training.batches import Step
from qwen_image.training.file_names import best_name, lora_name
from qwen_image.training.interruption import ALREADY_FINISHED
from qwen_image.training.metadata import progress_metadata
from qwen_image.training.state import (
    Facts,
    list_states,
    read_facts,
    remove_leftovers,
    remove_passed,
    remove_state,
    state_name,
    write_state,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

    from qwen_image.training.arguments import Settings
    from qwen_image.training.hub import Uploader
    from qwen_image.training.ownership import NoOwnership, Ownership
    from qwen_image.training.run import TrainingRun

log = logging.getLogger(__name__)
RUN_KEY = "qwen_image.run"
"""Metadata key that tells which training a LoRA is the finished result of."""
BESIDE_THE_RESULT = frozenset({
    "config_file", "logging_dir", "log_with", "log_prefix", "log_tracker_name", "log_tracker_config", "log_config",
    "wandb_run_name", "max_data_loader_n_workers", "persistent_data_loader_workers", "ddp_timeout",
    "ddp_gradient_as_bucket_view", "ddp_static_graph", "resume", "resume_from_huggingface", "async_upload",
    "stop_before", "save_state_every_n_minutes",
    "sample_every_n_steps", "sample_every_n_epochs", "sample_at_first",
})  # fmt: skip
"""Settings that a finished training may change without being done again: they leave none of its files otherwise. Sample
pictures of what it was on the way cannot be made afterwards, whatever is done again.
"""
NAMED = ("dit", "vae", "text_encoder")
"""Paths whose last part stands in the LoRA's metadata."""
PATHS = frozenset({
    *NAMED, "dataset_config", "latents_manifest", "text_encoder_outputs_manifest", "prompts_manifest", "output_dir",
    "sample_prompts", "network_weights", "base_weights",
})  # fmt: skip
"""Settings that say where something is; what is there counts by its content, in `made_from`."""


class Saver:
    """Writes a training's files in its first process; in the others it does nothing."""

    def __init__(self, run: TrainingRun, uploader: Uploader, ownership: Ownership | NoOwnership) -> None:
        self._run = run
        self._uploader = uploader
        self._ownership = ownership
        self._settings = run.settings
        self._name = run.settings.output_name
        self._main = run.accelerator.is_main_process
        self._saved_at = time.monotonic()
        self._saved_step = 0

    def finish(self) -> Path:
        """Write the last state and, last of all, the trained LoRA; return its path."""
        path = lora_path(self._settings)
        if self._main:
            if self._settings.save_state_on_train_end or self._settings.save_state:
                self._save_state(state_name(self._name), kept=True)
            self._save_lora(path, {RUN_KEY: run_digest(self._settings, self._run.made_from)})
            remove_passed(list_states(self._run.output_dir, self._name), newest=path)
        return path

    def save_if_due(self, step: Step) -> None:
        """Write the files in between that are due after this step; older ones go only once the newer are complete."""
        if not self._main:
            return
        settings = self._settings
        every = settings.save_every_n_steps
        if every and step.number % every == 0:
            self._save_with_state(step=step.number)
            keep = settings.save_last_n_steps
            self._remove(self._remove_lora, "step", every, outdated_step(step.number, every=every, keep=keep))
            keep = settings.save_last_n_steps_state or keep
            self._remove(self._remove_state, "step", every, outdated_step(step.number, every=every, keep=keep))
        every = settings.save_every_n_epochs
        # the last epoch's file is the final one
        if every and step.ends_epoch and step.epoch % every == 0 and step.epoch < self._run.plan.epochs:
            self._save_with_state(epoch=step.epoch)
            keep = settings.save_last_n_epochs
            self._remove(self._remove_lora, "epoch", every, outdated_epoch(step.epoch, every=every, keep=keep))
            keep = settings.save_last_n_epochs_state or keep
            self._remove(self._remove_state, "epoch", every, outdated_epoch(step.epoch, every=every, keep=keep))
        minutes = settings.save_state_every_n_minutes
        if minutes and time.monotonic() - self._saved_at >= 60 * minutes:
            self.save_passing_state()

    def save_passing_state(self) -> None:
        """Save what is needed to go on; states before it that nobody asked for go."""
        # one that was asked for at this very step serves as well
        if self._main and self._saved_step != self._run.progress.step:
            self._save_state(state_name(self._name, step=self._run.progress.step), kept=False)

    def save_best(self) -> None:
        """Write the LoRA as the best one so far. The kept weights are in place."""
        if self._main:
            self._write_lora(self._run.output_dir / best_name(self._name), {})

    def _save_with_state(self, *, step: int | None = None, epoch: int | None = None) -> None:
        self._save_lora(self._run.output_dir / lora_name(self._name, step=step, epoch=epoch), {})
        if self._settings.save_state:
            self._save_state(state_name(self._name, step=step, epoch=epoch), kept=True)

    def _save_lora(self, path: Path, more: dict[str, str]) -> None:
        with self._run.kept_weights():
            self._write_lora(path, more)

    def _write_lora(self, path: Path, more: dict[str, str]) -> None:
        run, settings = self._run, self._settings
        progress = progress_metadata(settings, step=run.progress.step, epoch=run.progress.epoch)
        tensors = adapter_tensors(run.transformer, precision=settings.save_precision)
        self._ownership.check()
        for file, named in files_of(path, tensors, settings.save_format):
            save_adapter(file, named, {**run.metadata, **progress, **more})
            self._uploader.file(file)

    def _save_state(self, name: str, *, kept: bool) -> None:
        run = self._run
        folder = run.output_dir / name
        facts = Facts(
            step=run.progress.step,
            epoch=run.progress.epoch,
            skipped_steps=run.progress.skipped_steps,
            recent_losses=list(run.progress.recent_losses),
            best_validation=run.progress.best_validation,
            made_from=run.made_from,
            kept=kept,
        )
        there = read_facts(folder)
        if there is not None and there.facts == facts:  # the very one that the training went on from
            return
        write_state(
            folder,
            facts,
            adapter={name: value for name, value in run.transformer.named_parameters() if value.requires_grad},
            optimizer=run.optimizer.state_dict(),
            average=None if run.average is None else run.average.state_dict(),
            check=self._ownership.check,
        )
        self._saved_at, self._saved_step = time.monotonic(), facts.step
        log.info("train: saved the state %s", folder)
        if kept and self._settings.save_state_to_huggingface:
            self._uploader.folder(folder)
        # another training's stay until this one is done: who changes the settings back goes on from them
        own = [saved for saved in list_states(run.output_dir, self._name) if saved.facts.made_from == run.made_from]
        remove_passed(own, newest=folder)

    def _remove(self, remove: Callable[..., None], unit: str, every: int, newest: int | None) -> None:
        """Remove what is outdated: the newest of it, and those before that a killed training did not come to."""
        for count in range(every, (newest or 0) + 1, every):
            remove(**{unit: count})

    def _remove_lora(self, *, step: int | None = None, epoch: int | None = None) -> None:
        path = self._run.output_dir / lora_name(self._name, step=step, epoch=epoch)
        for file, _ in files_of(path, {}, self._settings.save_format):
            file.unlink(missing_ok=True)

    def _remove_state(self, *, step: int | None = None, epoch: int | None = None) -> None:
        remove_state(self._run.output_dir / state_name(self._name, step=step, epoch=epoch))


def lora_path(settings: Settings) -> Path:
    """Return where the trained LoRA goes."""
    return Path(settings.output_dir) / f"{settings.output_name}.safetensors"


def outdated_epoch(epoch: int, *, every: int, keep: int | None) -> int | None:
    """Return the epoch whose file may go once this epoch's is written, if there is one. `keep` counts files."""
    old = epoch - every * keep if keep else 0
    return old if old > 0 else None


def outdated_step(step: int, *, every: int, keep: int | None) -> int | None:
    """Return the step whose file may go once this step's is written, if there is one. `keep` counts steps."""
    newest_old = step - keep - 1 if keep else 0
    old = newest_old - newest_old % every
    return old if old > 0 else None


def run_digest(settings: Settings, made_from: dict[str, object]) -> str:
    """Return a hash of everything that a finished training's files follow from, paths of inputs left out."""
    own = {key: value for key, value in settings.as_dict().items() if key not in BESIDE_THE_RESULT | PATHS}
    own |= {key: PurePath(settings.as_dict()[key] or "").name for key in NAMED}
    return hashlib.sha256(json.dumps([own, made_from], sort_keys=True).encode()).hexdigest()


def is_finished(settings: Settings, made_from: dict[str, object]) -> bool:
    """Whether the LoRA that these settings ask for is there, whole, and the result of this very training."""
    wanted = run_digest(settings, made_from)
    files = [file for file, _ in files_of(lora_path(settings), {}, settings.save_format)]
    try:
        return all(read_header(file).metadata.get(RUN_KEY) == wanted for file in files)
    except (OSError, ContainerError):
        return False


def tidy_up(settings: Settings, accelerator: Accelerator) -> Path:
    """Do what a training does last, where it was killed before it could; return the finished LoRA's path."""
    path, folder = lora_path(settings), Path(settings.output_dir)
    if accelerator.is_main_process:
        log.info("train: %s %s", path, ALREADY_FINISHED)
        remove_leftovers(folder, settings.output_name)
        remove_passed(list_states(folder, settings.output_name), newest=path)
    return path
