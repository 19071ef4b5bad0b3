"""What a training needs before its first step: the launcher's choices, the plan, the model with its adapter, AdamW."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from qwen_image.dataset.config import DatasetSettings
from qwen_image.problems import InputError, Problem
from qwen_image.training import adapter, schedule
from qwen_image.training.batches import batches_per_epoch
from qwen_image.training.items import CacheShape, TrainingItem
from qwen_image.training.key_values import optimizer_arguments, target_patterns
from qwen_image.training.loading import NoiseSettings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import QwenImageTransformer2DModel

    from qwen_image.training.arguments import Settings


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long the training is."""

    train_items: int
    """Visits of an epoch: items times their repeats."""
    batches_per_epoch: int
    """Of all processes together."""
    steps_per_epoch: int
    """Optimizer steps."""
    total_steps: int
    epochs: int
    """The last one may be cut short by the number of steps."""
    warmup_steps: int


def make_plan(
    settings: Settings, items: Sequence[TrainingItem], datasets: Mapping[int, DatasetSettings], *, processes: int
) -> Plan:
    """Count items, batches, steps and epochs."""
    batches = batches_per_epoch(items, datasets)
    in_epoch = schedule.steps_per_epoch(batches, processes=processes, accumulation=settings.gradient_accumulation_steps)
    total = schedule.total_steps(settings.max_train_steps, settings.max_train_epochs, steps_in_epoch=in_epoch)
    return Plan(
        train_items=sum(datasets[item.dataset].num_repeats for item in items),
        batches_per_epoch=batches,
        steps_per_epoch=in_epoch,
        total_steps=total,
        epochs=-(-total // in_epoch),
        warmup_steps=schedule.resolve_warmup(settings.lr_warmup_steps, total_steps=total),
    )


def make_accelerator(settings: Settings) -> Accelerator:
    """Return accelerate's object for the devices and the precision that the launcher or the settings chose."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    precision = settings.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    if precision not in ("no", "bf16"):
        mend = "launch with --mixed_precision bf16, or set mixed_precision to bf16"
        raise InputError(
            [Problem(file="accelerate", key="mixed_precision", found=f"{precision} is not supported", mend=mend)]
        )
    handlers = [
        DistributedDataParallelKwargs(
            # nothing reads the text that leaves the last block, so the layers that make it get no gradient
            find_unused_parameters=True,
            gradient_as_bucket_view=settings.ddp_gradient_as_bucket_view,
            static_graph=settings.ddp_static_graph,
        )
    ]
    if settings.ddp_timeout is not None:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=settings.ddp_timeout)))
    return Accelerator(mixed_precision=precision, kwargs_handlers=handlers)


def load_model(settings: Settings, accelerator: Accelerator, shape: CacheShape) -> QwenImageTransformer2DModel:
    """Load the frozen base in bf16, or in float32 without mixed precision, and check that the cache fits it."""
    from qwen_image.models.transformer import load_transformer

    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    transformer = load_transformer(settings.dit, device=accelerator.device, dtype=dtype)
    config = transformer.config
    problems = []
    for key, want, have, mend in (
        ("num_layers", settings.num_layers, config.num_layers, "remove num_layers, or choose another checkpoint"),
        ("latent channels", shape.channels, config.in_channels // 4, "cache with the VAE that belongs to this model"),
        (
            "text hidden size", shape.hidden_size, config.joint_attention_dim,
            "cache with the text encoder that belongs to this model",
        ),
    ):  # fmt: skip
        if want is not None and want != have:
            found = f"the checkpoint has {have}, {'the settings' if key == 'num_layers' else 'the cache'} {want}"
            problems.append(Problem(file=settings.dit, key=key, found=found, mend=mend))
    if problems:
        raise InputError(problems)
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer


def add_adapter(settings: Settings, transformer: QwenImageTransformer2DModel) -> list[str]:
    """Put the adapter of the settings on the model; returns the adapted modules' paths."""
    rank = adapter_rank(settings)
    return adapter.add_adapter(
        transformer,
        rank=rank,
        alpha=adapter.effective_alpha(settings.network_alpha, rank),
        dropout=settings.network_dropout or 0.0,
        patterns=target_patterns(settings.network_args),
        seed=settings.seed,
    )


def adapter_rank(settings: Settings) -> int:
    """Return the rank in use."""
    return settings.network_dim or adapter.DEFAULT_RANK


def make_optimizer(settings: Settings, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return AdamW with the settings' arguments. The learning rate is set anew before each step."""
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, **optimizer_arguments(settings.optimizer_args))


def noise_settings(settings: Settings) -> NoiseSettings:
    """Return what decides how much noise an item gets."""
    return NoiseSettings(
        seed=settings.seed,
        law=settings.timestep_sampling,
        sigmoid_scale=settings.sigmoid_scale,
        shift=settings.discrete_flow_shift,
        low=settings.min_timestep or 0,
        high=settings.max_timestep or 1000,
    )
