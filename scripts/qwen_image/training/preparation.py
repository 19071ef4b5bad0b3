"""Everything a training needs before its first step: the plan, the model with its adapter, optimizer and metadata."""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qwen_image.adapter.network import DEFAULT_RANK, add_adapter, effective_alpha, trainable_parameters
from qwen_image.dataset.config import DatasetSettings, load_dataset_config
from qwen_image.models.checkpoint import checkpoint_files
from qwen_image.problems import InputError, Problem
from qwen_image.training import schedule
from qwen_image.training.batches import batches_per_epoch
from qwen_image.training.items import CacheShape, TrainingItem, check_cache_files, join_manifests
from qwen_image.training.key_values import optimizer_arguments, target_patterns
from qwen_image.training.loading import NoiseSettings
from qwen_image.training.metadata import RunFacts, run_metadata

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import QwenImageTransformer2DModel

    from qwen_image.training.arguments import Settings

log = logging.getLogger(__name__)


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


@dataclass(kw_only=True)
class TrainingRun:
    """Everything the loop works with. What changes from step to step stands at the end."""

    settings: Settings
    accelerator: Accelerator
    datasets: Mapping[int, DatasetSettings]
    items: Sequence[TrainingItem]
    plan: Plan
    metadata: Mapping[str, str]
    transformer: QwenImageTransformer2DModel
    model: torch.nn.Module
    """The transformer as accelerate wraps it: the one to call."""
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Of the step done last, from 1."""
    recent_losses: deque[float] = field(default_factory=deque)
    """Of the last epoch's worth of steps."""

    @property
    def average_loss(self) -> float:
        """Mean of the recent losses."""
        return math.fsum(self.recent_losses) / len(self.recent_losses)


def prepare(settings: Settings, accelerator: Accelerator) -> TrainingRun:
    """Read what the settings name, cheap things first, and say in the log what will be trained.

    Raises InputError for whatever does not fit; the model is loaded only when the cache is whole.
    """
    datasets = {dataset.index: dataset for dataset in load_dataset_config(settings.dataset_config)}
    joined = join_manifests(settings.latents_manifest, settings.text_encoder_outputs_manifest, list(datasets.values()))
    for reason in joined.left_out:
        log.warning("train: left out: %s", reason)
    shape = check_cache_files(joined.items)
    _make_output_folder(settings)
    plan = make_plan(settings, joined.items, datasets, processes=accelerator.num_processes)
    transformer = _load_transformer(settings, accelerator, shape)
    rank = settings.network_dim or DEFAULT_RANK
    facts = RunFacts(
        rank=rank,
        alpha=effective_alpha(settings.network_alpha, rank),
        mixed_precision=accelerator.mixed_precision,
        train_items=plan.train_items,
        batches_per_epoch=plan.batches_per_epoch,
        epochs=plan.epochs,
        total_steps=plan.total_steps,
    )
    targets = add_adapter(
        transformer,
        rank=facts.rank,
        alpha=facts.alpha,
        dropout=settings.network_dropout or 0.0,
        patterns=target_patterns(settings.network_args),
        seed=settings.seed,
    )
    transformer.train()
    parameters = trainable_parameters(transformer)
    # the learning rate is set anew before each step
    adamw = torch.optim.AdamW(parameters, lr=settings.learning_rate, **optimizer_arguments(settings.optimizer_args))
    model, optimizer = accelerator.prepare(transformer, adamw)
    run = TrainingRun(
        settings=settings,
        accelerator=accelerator,
        datasets=datasets,
        items=joined.items,
        plan=plan,
        metadata=run_metadata(settings, list(datasets.values()), facts),
        transformer=transformer,
        model=model,
        parameters=parameters,
        optimizer=optimizer,
        recent_losses=deque(maxlen=plan.steps_per_epoch),
    )
    _log_start(run, targets)
    return run


def make_accelerator(settings: Settings) -> Accelerator:
    """Return accelerate's object for the devices and the precision that the launcher or the settings chose."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    precision = settings.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    if precision not in ("no", "bf16"):
        found, mend = (
            f"{precision} is not supported",
            "launch with --mixed_precision bf16, or set mixed_precision: bf16",
        )
        raise InputError([Problem(file="accelerate launch", key="mixed_precision", found=found, mend=mend)])
    handlers = [
        DistributedDataParallelKwargs(
            # nothing reads the text that leaves the last block, so the layers that make it get no gradient
            find_unused_parameters=not settings.ddp_static_graph,
            gradient_as_bucket_view=settings.ddp_gradient_as_bucket_view,
            static_graph=settings.ddp_static_graph,
        )
    ]
    if settings.ddp_timeout is not None:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=settings.ddp_timeout)))
    # without a GPU the launcher does not say that its processes belong together; each would train alone
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision=precision, kwargs_handlers=handlers
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        found = f"{launched} processes were launched, but they did not find each other"
        mend = "launch with --multi_gpu, or as one process"
        raise InputError([Problem(file="accelerate launch", key="num_processes", found=found, mend=mend)])
    return accelerator


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
        epochs=math.ceil(total / in_epoch),
        warmup_steps=schedule.resolve_warmup(settings.lr_warmup_steps, total_steps=total),
    )


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


def _load_transformer(settings: Settings, accelerator: Accelerator, shape: CacheShape) -> QwenImageTransformer2DModel:
    """Load the base in bf16, or in float32 without mixed precision, and check that the cache fits it."""
    from qwen_image.models.transformer import load_transformer

    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    transformer = load_transformer(settings.dit, device=accelerator.device, dtype=dtype)
    config = transformer.config
    layers = settings.num_layers or config.num_layers
    problems = [
        Problem(file=settings.dit, key=key, found=f"the checkpoint has {have}, {who} {want}", mend=mend)
        for key, have, who, want, mend in (
            ("num_layers", config.num_layers, "the settings say", layers, "remove it, or choose its checkpoint"),
            (
                "latent channels", config.in_channels // 4, "the cached latents", shape.channels,
                "cache the latents with this model's VAE",
            ),
            (
                "text hidden size", config.joint_attention_dim, "the cached embeddings", shape.hidden_size,
                "cache the captions with this model's text encoder",
            ),
        )
        if want != have
    ]  # fmt: skip
    if problems:
        raise InputError(problems)
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer


def _make_output_folder(settings: Settings) -> None:
    lora = Path(settings.output_dir) / f"{settings.output_name}.safetensors"
    if any(os.path.realpath(lora) == os.path.realpath(path) for path in checkpoint_files(settings.dit, "dit")):
        found, mend = "is the dit itself; the LoRA would be written over it", "choose another output_name"
        raise InputError([Problem(file=str(lora), key="output_name", found=found, mend=mend)])
    try:
        Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found = f"the folder cannot be made ({error.strerror})"
        raise InputError(
            [Problem(file=settings.output_dir, key="output_dir", found=found, mend="choose another folder")]
        ) from error


def _log_start(run: TrainingRun, targets: Sequence[str]) -> None:
    plan, accelerator = run.plan, run.accelerator
    numbers = sum(parameter.numel() for parameter in run.parameters)
    log.info(
        "train: %d items in %d batches an epoch, %d steps (%d epochs)",
        len(run.items), plan.batches_per_epoch, plan.total_steps, plan.epochs,
    )  # fmt: skip
    log.info(
        "train: LoRA of rank %s on %d layers, %s trainable parameters; %s x %d, mixed precision %s",
        run.metadata["ss_network_dim"], len(targets), f"{numbers:,}", accelerator.device.type,
        accelerator.num_processes, accelerator.mixed_precision,
    )  # fmt: skip
    if target_patterns(run.settings.network_args).verbose:
        for path in targets:
            log.info("train: LoRA on %s", path)
