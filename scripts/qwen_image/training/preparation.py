"""Everything a training needs before its first step: data, plan, model, adapter, optimizer, a state to go on from."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qwen_image.adapter.network import Network, add_adapter, parameter_groups, trainable_parameters
from qwen_image.adapter.options import KINDS, network_options
from qwen_image.adapter.weights import check_weight_files, merge_base_weights
from qwen_image.dataset.config import DatasetSettings, load_dataset_config
from qwen_image.device import describe_device, prepare_deterministic_algorithms
from qwen_image.models.checkpoint import checkpoint_files
from qwen_image.problems import InputError, Problem
from qwen_image.training import schedule
from qwen_image.training.batches import batches_per_epoch
from qwen_image.training.captions import empty_caption
from qwen_image.training.ema import Average
from qwen_image.training.identity import inputs_digest, result_settings
from qwen_image.training.interruption import WENT_ON
from qwen_image.training.items import (
    CacheShape,
    Joined,
    TrainingItem,
    check_cache_files,
    join_manifests,
    write_left_out,
)
from qwen_image.training.metadata import RunFacts, run_metadata
from qwen_image.training.noise_levels import NoiseLevels
from qwen_image.training.optimizers import make_optimizer
from qwen_image.training.provenance import provenance
from qwen_image.training.run import Plan, Progress, TrainingRun
from qwen_image.training.state import Saved, read_state
from qwen_image.training.trackers import check_trackers
from qwen_image.training.validation import split_items

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import QwenImageTransformer2DModel

    from qwen_image.training.arguments import Settings

log = logging.getLogger(__name__)
WAIT_MINUTES = 120
"""How long processes wait for each other unless ddp_timeout says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained on, checked."""

    datasets: Mapping[int, DatasetSettings]
    items: Sequence[TrainingItem]
    held_out: Sequence[TrainingItem]
    joined: Joined
    """Both manifests, with what of them is left out."""
    shape: CacheShape


def read_data(settings: Settings) -> Data:
    """Read the dataset file and the manifests, and check every cache file's header.

    Raises InputError for whatever does not fit.
    """
    check_weight_files(settings)
    if problems := check_trackers(settings.as_dict()):
        raise InputError(problems)
    datasets = {dataset.index: dataset for dataset in load_dataset_config(settings.dataset_config)}
    joined = join_manifests(settings.latents_manifest, settings.text_encoder_outputs_manifest, list(datasets.values()))
    shape = check_cache_files(joined.items, empty_caption(settings))
    items, held_out = split_items(joined.items, settings.validation_split)
    # made for its check of the law, which would otherwise wait until the model is loaded
    NoiseLevels(settings, items, datasets)
    _make_output_folder(settings)
    for reject in joined.left_out:
        log.warning("train: left out: %s", reject)
    return Data(datasets=datasets, items=items, held_out=held_out, joined=joined, shape=shape)


def origin_of(settings: Settings, accelerator: Accelerator) -> dict[str, object]:
    """Return everything that the result follows from, as plain values; two trainings of equal origin end equal."""
    origin = {
        **result_settings(settings),
        **inputs_digest(settings),
        "mixed_precision": accelerator.mixed_precision,
        "num_processes": accelerator.num_processes,
        **_compiler(accelerator),
    }
    # as it will read when it comes back from a state
    return json.loads(json.dumps(origin))


def _compiler(accelerator: Accelerator) -> dict[str, str]:
    """What the launcher's compiler is told, where it is on: compiled code rounds otherwise."""
    plugin = accelerator.state.dynamo_plugin
    return {} if plugin.backend == "NO" else {"dynamo": str(plugin.to_kwargs())}


def prepare(
    settings: Settings,
    accelerator: Accelerator,
    data: Data,
    plan: Plan,
    origin: Mapping[str, object],
    saved: Saved | None,
) -> TrainingRun:
    """Load the model, put the adapter on it, go on from a state if there is one, and say what will be trained.

    Raises InputError for whatever does not fit.
    """
    rates = schedule.make_schedule(settings, plan.total_steps)
    if accelerator.is_main_process:
        table = Path(settings.output_dir) / f"{settings.output_name}.left_out.tsv"
        write_left_out(table, data.joined, data.held_out)
    transformer = _load_transformer(settings, accelerator, data.shape)
    merge_base_weights(transformer, settings)
    network = add_adapter(transformer, settings)
    transformer.train()
    parameters = trainable_parameters(transformer)
    # the learning rate is set anew before each step
    optimizer = make_optimizer(settings, parameter_groups(transformer, settings))
    model, optimizer = accelerator.prepare(transformer, optimizer)
    average = Average(parameters, settings.ema_decay) if settings.ema_decay is not None else None
    datasets = list(data.datasets.values())
    facts = RunFacts(
        kind=network.kind,
        rank=network.rank,
        alpha=network.alpha,
        mixed_precision=accelerator.mixed_precision,
        train_items=plan.train_items,
        batches_per_epoch=plan.batches_per_epoch,
        epochs=plan.epochs,
        total_steps=plan.total_steps,
    )
    run = TrainingRun(
        settings=settings,
        accelerator=accelerator,
        datasets=data.datasets,
        items=data.items,
        held_out=data.held_out,
        plan=plan,
        schedule=rates,
        metadata=run_metadata(settings, datasets, facts) | provenance(settings, datasets, origin, data.items[0]),
        made_from=origin,
        transformer=transformer,
        model=model,
        parameters=parameters,
        optimizer=optimizer,
        average=average,
        progress=Progress(recent_losses=deque(maxlen=plan.steps_per_epoch)),
    )
    _log_start(run, network)
    if saved is not None:
        restore(run, saved)
    return run


def restore(run: TrainingRun, saved: Saved) -> None:
    """Put a training where a state left it, to the bit. Raises InputError when the state is damaged."""
    adapter, optimizer, average = read_state(saved)
    parameters = {name: value for name, value in run.transformer.named_parameters() if value.requires_grad}
    if adapter.keys() != parameters.keys() or (average is None) != (run.average is None):
        found, mend = "does not fit the adapter that the settings ask for", "remove this folder to start anew"
        raise InputError([Problem(file=str(saved.folder), found=found, mend=mend)])
    with torch.no_grad():
        for name, value in adapter.items():
            parameters[name].copy_(value)
    run.optimizer.load_state_dict(optimizer)
    if run.average is not None:
        run.average.load_state_dict(average)
    progress, facts = run.progress, saved.facts
    progress.step, progress.epoch, progress.skipped_steps = facts.step, facts.epoch, facts.skipped_steps
    progress.recent_losses.extend(facts.recent_losses)
    progress.best_validation = facts.best_validation
    log.info("train: %s %d of %d, from %s", WENT_ON, facts.step, run.plan.total_steps, saved.folder)


def make_accelerator(settings: Settings) -> Accelerator:
    """Return accelerate's object for the devices and the precision that the launcher or the settings chose."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    prepare_deterministic_algorithms()
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
    # the first process makes the sample pictures and copies files while the others wait, longer than the ten minutes
    # after which NCCL gives up by itself
    handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=settings.ddp_timeout or WAIT_MINUTES)))
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


def _log_start(run: TrainingRun, network: Network) -> None:
    plan, accelerator = run.plan, run.accelerator
    numbers = sum(parameter.numel() for parameter in run.parameters)
    held_out = f", {len(run.held_out)} held out" if run.held_out else ""
    log.info(
        "train: %d items in %d batches an epoch, %d steps (%d epochs)%s",
        len(run.items), plan.batches_per_epoch, plan.total_steps, plan.epochs, held_out,
    )  # fmt: skip
    log.info(
        "train: %s of rank %s on %d layers, %s trainable parameters; %s x %d, mixed precision %s",
        KINDS[network.kind], network.rank, len(network.targets), f"{numbers:,}", accelerator.device.type,
        accelerator.num_processes, accelerator.mixed_precision,
    )  # fmt: skip
    log.info("train: %s", describe_device(str(accelerator.device)))
    if network_options(run.settings.as_dict(), network.kind).verbose:
        for path in network.targets:
            log.info("train: %s on %s", KINDS[network.kind], path)
