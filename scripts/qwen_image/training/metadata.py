"""The LoRA's metadata: the ss_*, modelspec.* and sshs_* keys that the field's tools show.

No wall-clock time, random id or machine path: the time keys follow from SOURCE_DATE_EPOCH or are left out, so is the
session id, and paths are cut to their base names. Values are text, absent ones read "None", as in the field.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePath
from typing import TYPE_CHECKING

from qwen_image.adapter.options import MODULES
from qwen_image.container import data_sha256, serialize
from qwen_image.dataset.config import DatasetSettings
from qwen_image.problems import InputError, Problem
from qwen_image.training.optimizers import optimizer_label
from qwen_image.training.schedule import resolve_steps

if TYPE_CHECKING:
    import torch

    from qwen_image.training.arguments import Settings

IMPLEMENTATION = "https://github.com/QwenLM/Qwen-Image"
RESOLUTION = "1328x1328"  # what the field writes for this model, whatever the dataset's
# what loaders need; --no_metadata keeps these
KEPT = ("ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")
LEGACY_HASH_RANGE = (0x100000, 0x110000)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the settings alone do not tell about a training."""

    kind: str = "lora"
    """``lora``, ``dora``, ``loha`` or ``lokr``."""
    rank: int
    alpha: float
    mixed_precision: str
    train_items: int
    """Visits of an epoch: items times their repeats."""
    batches_per_epoch: int
    epochs: int
    total_steps: int


def run_metadata(settings: Settings, datasets: Sequence[DatasetSettings], facts: RunFacts) -> dict[str, str]:
    """Return the metadata that all files of a training share."""
    values: dict[str, object] = {
        "ss_output_name": settings.output_name,
        "ss_learning_rate": settings.learning_rate,
        "ss_num_train_items": facts.train_items,
        "ss_num_batches_per_epoch": facts.batches_per_epoch,
        "ss_num_epochs": facts.epochs,
        "ss_gradient_checkpointing": settings.gradient_checkpointing,
        "ss_gradient_checkpointing_cpu_offload": settings.gradient_checkpointing_cpu_offload,
        "ss_gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "ss_max_train_steps": facts.total_steps,
        "ss_lr_warmup_steps": resolve_steps(settings.lr_warmup_steps, total_steps=facts.total_steps),
        "ss_lr_scheduler": settings.lr_scheduler,
        "ss_base_model_version": "qwen_image",
        "ss_network_module": MODULES[facts.kind],
        "ss_network_dim": facts.rank,
        "ss_network_alpha": facts.alpha,
        "ss_network_dropout": settings.network_dropout,
        "ss_mixed_precision": facts.mixed_precision,
        "ss_seed": settings.seed,
        "ss_training_comment": settings.training_comment,
        "ss_optimizer": optimizer_label(settings),
        "ss_max_grad_norm": settings.max_grad_norm,
        "ss_fp8_base": settings.fp8_base,
        "ss_full_fp16": False,
        "ss_full_bf16": False,
        "ss_weighting_scheme": settings.weighting_scheme,
        "ss_logit_mean": settings.logit_mean,
        "ss_logit_std": settings.logit_std,
        "ss_mode_scale": settings.mode_scale,
        "ss_guidance_scale": settings.guidance_scale,
        "ss_timestep_sampling": settings.timestep_sampling,
        "ss_sigmoid_scale": settings.sigmoid_scale,
        "ss_discrete_flow_shift": settings.discrete_flow_shift,
        "ss_datasets": json.dumps([_dataset(dataset) for dataset in datasets], ensure_ascii=False),
        "ss_sd_model_name": _base_name(settings.dit),
        "ss_vae_name": _base_name(settings.vae),
        "ss_text_encoder_name": _base_name(settings.text_encoder),
    }
    if settings.network_args:
        pairs = (argument.partition("=") for argument in settings.network_args)
        values["ss_network_args"] = json.dumps({key.strip(): value.strip() for key, _, value in pairs})
    if settings.no_metadata:
        values = {key: value for key, value in values.items() if key in KEPT}
    return {key: str(value) for key, value in values.items()} | _model_spec(settings)


def progress_metadata(settings: Settings, *, step: int, epoch: int) -> dict[str, str]:
    """Return what differs between the files of a training; epochs count from 1."""
    if settings.no_metadata:
        return {}
    values = {"ss_steps": str(step), "ss_epoch": str(epoch)}
    moment = source_date()
    if moment is not None:
        values |= dict.fromkeys(("ss_training_started_at", "ss_training_finished_at"), str(moment.timestamp()))
    return values


def with_hashes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata with the two hashes by which the field's tools recognise a LoRA.

    ``sshs_model_hash`` is the SHA-256 of the file's data section, ``sshs_legacy_hash`` that of a part of the file as it
    would be with the ss_* keys alone.
    """
    start, end = LEGACY_HASH_RANGE
    legacy, position = hashlib.sha256(), 0
    for part in serialize(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")}):
        legacy.update(part[max(0, start - position) : max(0, end - position)])
        position += len(part)
    return {
        **metadata,
        "sshs_model_hash": data_sha256(tensors),
        "sshs_legacy_hash": legacy.hexdigest()[:8],
    }


def source_date() -> datetime | None:
    """Return the moment that SOURCE_DATE_EPOCH names, in UTC, if it is set: the only time that may enter a file."""
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if not text:
        return None
    try:
        return datetime.fromtimestamp(int(text), UTC)
    except (ValueError, OverflowError, OSError) as error:
        mend = "give whole seconds since 1970, or unset it"
        raise InputError([Problem(file="SOURCE_DATE_EPOCH", found=f"{text!r} is no time", mend=mend)]) from error


def _model_spec(settings: Settings) -> dict[str, str]:
    moment = source_date()
    resolution = re.findall(r"\d+", settings.metadata_reso or RESOLUTION)
    bounds = (settings.min_timestep, settings.max_timestep)
    values = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{settings.metadata_arch or 'Qwen-Image'}/lora",
        "implementation": IMPLEMENTATION,
        "title": settings.metadata_title or settings.output_name,
        "resolution": f"{resolution[0]}x{resolution[-1]}",
        "date": moment and moment.replace(tzinfo=None).isoformat(timespec="seconds"),
        "author": settings.metadata_author,
        "description": settings.metadata_description,
        "license": settings.metadata_license,
        "tags": settings.metadata_tags,
        "timestep_range": None if bounds == (None, None) else f"{bounds[0] or 0},{bounds[1] or 1000}",
    }
    return {f"modelspec.{key}": value for key, value in values.items() if value is not None}


def _dataset(dataset: DatasetSettings) -> dict[str, object]:
    paths = {key: getattr(dataset, key) for key in ("image_directory", "image_jsonl_file", "control_directory")}
    return {
        "resolution": list(dataset.resolution),
        "caption_extension": dataset.caption_extension,
        "batch_size_per_device": dataset.batch_size,
        "num_repeats": dataset.num_repeats,
        "enable_bucket": dataset.enable_bucket,
        "bucket_no_upscale": dataset.bucket_no_upscale,
        **{key: _base_name(path) for key, path in paths.items() if path is not None},
        "has_control": dataset.control_directory is not None,
        # no key of the field, so it appears only where it says something
        **({"loss_weight": dataset.loss_weight} if dataset.loss_weight != 1 else {}),
    }


def _base_name(path: str | None) -> str | None:
    return PurePath(path).name or path if path else path
