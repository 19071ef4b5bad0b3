"""The LoRA on a Qwen-Image transformer: which modules it adapts, how it starts, and that nothing else is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from qwen_image.problems import InputError, Problem
from qwen_image.training.key_values import TargetPatterns
from qwen_image.training.randomness import generator

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel
    from peft.tuners.lora import LoraLayer

ADAPTER = "default"
BLOCKS = "transformer_blocks"
DEFAULT_RANK = 4  # the field's


def add_adapter(
    transformer: QwenImageTransformer2DModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    patterns: TargetPatterns,
    seed: int,
) -> list[str]:
    """Freeze the transformer and put a trainable float32 LoRA on every wanted Linear of its blocks.

    Returns the adapted modules' paths. The LoRA starts as nothing: down is Kaiming-uniform with a = sqrt(5), up is
    zero. Raises InputError when the patterns leave no module.
    """
    from peft import LoraConfig

    targets = [path for path in linear_paths(transformer) if patterns.wants(path)]
    if not targets:
        mend = "loosen exclude_patterns; they match whole paths such as transformer_blocks.0.attn.to_q"
        raise InputError([Problem(file="network_args", found="the patterns exclude every module", mend=mend)])
    transformer.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none")
    transformer.add_adapter(config, adapter_name=ADAPTER)
    adapted = dict(lora_layers(transformer))
    assert sorted(adapted) == sorted(targets), "peft adapted other modules than it was asked to"
    for path, layer in adapted.items():
        _initialise(layer, generator("adapter", seed, path))
    return targets


def effective_alpha(alpha: float | None, rank: int) -> float:
    """Return the alpha in use: 0 or none stands for the rank."""
    return alpha if alpha else rank


def linear_paths(transformer: torch.nn.Module) -> list[str]:
    """Return the dotted path of every Linear inside the transformer blocks, 14 a block, in the model's order."""
    return [
        path
        for path, module in transformer.named_modules()
        if path.startswith(f"{BLOCKS}.") and isinstance(module, torch.nn.Linear)
    ]


def lora_layers(transformer: torch.nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield path and layer of every adapted module."""
    from peft.tuners.lora import LoraLayer

    for path, module in transformer.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def trainable_parameters(transformer: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the adapter's weights."""
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def _initialise(layer: LoraLayer, random: torch.Generator) -> None:
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    # drawn on the CPU in float32 whatever the device and the base's dtype, so that every machine starts from the same
    start = torch.empty(down.shape)
    torch.nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=random)
    down.data = start.to(down.device)
    up.data = torch.zeros(up.shape, device=up.device)
