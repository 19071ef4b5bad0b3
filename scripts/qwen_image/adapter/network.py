"""The adapter on a Qwen-Image transformer: which modules it adapts, how it starts, and that nothing else is trained."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qwen_image.adapter.delta import kind_of
from qwen_image.adapter.initial import start_values
from qwen_image.adapter.options import (
    KINDS,
    MODULES,
    NetworkOptions,
    effective_alpha,
    network_kind,
    network_options,
    wrong_network,
)
from qwen_image.adapter.tensors import ADAPTER, ALPHA, adapted_layers, alpha_of, layer_parameters, put_tensors, rank_of
from qwen_image.adapter.weights import Modules, check_start, read_start
from qwen_image.problems import InputError, Problem
from qwen_image.training.randomness import generator

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel
    from peft import PeftConfig

    from qwen_image.training.arguments import Settings

log = logging.getLogger(__name__)
BLOCKS = "transformer_blocks"
DEFAULT_RANK = 4  # the field's


@dataclass(frozen=True, kw_only=True)
class Network:
    """What was put on the transformer."""

    kind: str
    """``lora``, ``dora``, ``loha`` or ``lokr``."""
    rank: int
    """Where a file's modules differ, what most of them have; so for alpha."""
    alpha: float
    targets: list[str]
    """The adapted modules' dotted paths, in the model's order."""


def add_adapter(transformer: QwenImageTransformer2DModel, settings: Settings) -> Network:
    """Freeze the transformer and put a trainable float32 adapter on every wanted Linear of its blocks.

    It starts as a change of nothing, or as the file that ``network_weights`` names. Raises InputError when the patterns
    leave no module, or the file does not fit.
    """
    paths = linear_paths(transformer)
    start: Modules = {}
    if settings.network_weights:
        start = read_start(settings.network_weights, {path: transformer.get_submodule(path) for path in paths})
    from_file = settings.dim_from_weights
    network = _network_of_file(settings, start, paths) if from_file else _network(transformer, settings)
    options = network_options(settings.as_dict(), network.kind)
    _check_processes(options)
    values = dict(start)
    if not from_file:
        values = _fresh_values(transformer, settings.seed, network, options)
        check_start(settings.network_weights, start, values, kind=network.kind, rank=network.rank, alpha=network.alpha)
        # the file may hold alpha rounded
        values |= {path: {**parts, ALPHA: values[path][ALPHA]} for path, parts in start.items()}
    transformer.requires_grad_(False)
    transformer.add_adapter(_peft_config(settings, network, options), adapter_name=ADAPTER)
    layers = dict(adapted_layers(transformer))
    assert sorted(layers) == sorted(network.targets), "peft adapted other modules than it was asked to"
    for path, layer in layers.items():
        put_tensors(layer, values[path])
    if start:
        new = len(network.targets) - len(start)
        log.info("train: %d modules start from %s, %d anew", len(start), settings.network_weights, new)
    return network


def parameter_groups(transformer: torch.nn.Module, settings: Settings) -> list[dict[str, object]]:
    """Return the adapter's weights for an optimizer, with the ratio of each group's learning rate to the setting."""
    ratio = network_options(settings.as_dict()).loraplus_lr_ratio
    if ratio == 1:
        return [{"params": trainable_parameters(transformer), "lr_ratio": 1.0}]
    plain, up = [], []
    for _, layer in adapted_layers(transformer):
        for part, parameter in layer_parameters(layer).items():
            (up if part == "lora_up.weight" else plain).append(parameter)
    return [{"params": plain, "lr_ratio": 1.0}, {"params": up, "lr_ratio": float(ratio)}]


def trainable_parameters(transformer: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the adapter's weights."""
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def linear_paths(transformer: torch.nn.Module) -> list[str]:
    """Return the dotted path of every Linear inside the transformer blocks, 14 a block, in the model's order."""
    return [
        path
        for path, module in transformer.named_modules()
        if path.startswith(f"{BLOCKS}.") and isinstance(module, torch.nn.Linear)
    ]


def _fresh_values(
    transformer: torch.nn.Module, seed: int, network: Network, options: NetworkOptions
) -> dict[str, dict[str, torch.Tensor]]:
    return {
        path: start_values(
            network.kind,
            transformer.get_submodule(path).weight,
            rank=network.rank,
            alpha=network.alpha,
            options=options,
            # of its own for each module, so that other modules change nothing about how it starts
            random=generator("adapter", seed, path),
        )
        for path in network.targets
    }


def _network(transformer: torch.nn.Module, settings: Settings) -> Network:
    """What the settings ask for."""
    patterns = network_options(settings.as_dict()).patterns
    targets = [path for path in linear_paths(transformer) if patterns.wants(path)]
    if not targets:
        mend = "loosen exclude_patterns; they match whole paths such as transformer_blocks.0.attn.to_q"
        raise InputError([Problem(file="network_args", found="the patterns exclude every module", mend=mend)])
    rank = settings.network_dim or DEFAULT_RANK
    alpha = effective_alpha(settings.network_alpha, rank)
    return Network(kind=network_kind(settings.as_dict()), rank=rank, alpha=alpha, targets=targets)


def _network_of_file(settings: Settings, start: Modules, paths: Sequence[str]) -> Network:
    """What ``network_weights`` holds, checked against what the settings say about its kind."""
    kind = kind_of(next(iter(start.values())))
    problems = [
        Problem(file=settings.network_weights, key=key, found=f"{found} (it is a {KINDS[kind]})", mend=mend)
        for key, found, mend in wrong_network(settings.as_dict(), kind)
    ]
    if settings.network_module not in (None, MODULES[kind]):
        found, mend = f"it is a {KINDS[kind]}, network_module asks for another kind", f"set it to {MODULES[kind]}"
        problems.append(Problem(file=settings.network_weights, key="network_module", found=found, mend=mend))
    if problems:
        raise InputError(problems)
    # a whole LoKr has no rank but what its alpha says
    sizes = Counter((rank_of(parts), alpha_of(parts)) for parts in start.values())
    (rank, alpha), _ = sizes.most_common(1)[0]
    rank = rank or max(1, round(alpha or 1))
    targets = [path for path in paths if path in start]
    return Network(kind=kind, rank=rank, alpha=alpha or rank, targets=targets)


def _check_processes(options: NetworkOptions) -> None:
    """Processes wait for the gradients of all weights, and a dropped module has none."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if options.module_dropout and distributed and torch.distributed.get_world_size() > 1:
        found, mend = "module_dropout does not work with several processes", "give rank_dropout instead"
        raise InputError([Problem(file="network_args", key="module_dropout", found=found, mend=mend)])


def _peft_config(settings: Settings, network: Network, options: NetworkOptions) -> PeftConfig:
    """Shapes and first values are put in afterwards, so only what a layer computes with them matters here."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    if network.kind in ("lora", "dora"):
        return LoraConfig(
            r=network.rank,
            lora_alpha=network.alpha,
            lora_dropout=settings.network_dropout or 0.0,
            use_dora=network.kind == "dora",
            target_modules=network.targets,
            bias="none",
        )
    shared = {
        "r": network.rank,
        "alpha": network.alpha,
        "rank_dropout": options.rank_dropout,
        "module_dropout": options.module_dropout,
        "target_modules": network.targets,
    }
    if network.kind == "loha":
        return LoHaConfig(**shared)
    # what is left of a change is scaled up for what was dropped, as LoHa does and as the field does for both
    return LoKrConfig(**shared, rank_dropout_scale=True)
