"""The adapter on a transformer as tensors by the field's names: read from peft's modules and put into them.

A module at the path ``transformer_blocks.0.attn.to_q`` has the name ``lora_unet_transformer_blocks_0_attn_to_q``, and a
tensor that name, a dot and its part:

    LoRA  lora_down.weight (rank, in), lora_up.weight (out, rank)
    DoRA  the same and dora_scale (out, 1)
    LoHa  hada_w1_a, hada_w2_a (out, rank), hada_w1_b, hada_w2_b (rank, in)
    LoKr  lokr_w1 (a, b) or lokr_w1_a (a, rank) and lokr_w1_b (rank, b), the same of lokr_w2; both first sizes multiply
          to out, both second ones to in

and all of them the scalar alpha. `delta.py` has the formulas. peft keeps the same matrices; only a LoKr that is not low
rank is scaled otherwise there (by alpha / rank instead of not at all), which `put_tensors` sets right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

ADAPTER = "default"
PREFIX = "lora_unet_"
ALPHA = "alpha"
LOHA_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR_PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


def named_tensors(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors by the field's names, in float32 on their device. They share no memory with it."""
    tensors = {}
    for path, layer in adapted_layers(transformer):
        name = module_name(path)
        for part, parameter in layer_parameters(layer).items():
            value = parameter.detach().to(torch.float32, copy=True)
            # peft's magnitudes are a vector; a column says that they belong to the outputs
            tensors[f"{name}.{part}"] = value[:, None] if part == "dora_scale" else value
        tensors[f"{name}.{ALPHA}"] = torch.tensor(float(layer_alpha(layer)))
    return tensors


def load_tensors(transformer: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put tensors by the field's names into an adapter of the same kind; they bring their shapes, rank and alpha.

    Adapted modules that the tensors do not name stay as they are. Raises KeyError for names of other modules.
    """
    layers = {module_name(path): layer for path, layer in adapted_layers(transformer)}
    for name, parts in by_module(tensors).items():
        put_tensors(layers[name], parts)


def by_module(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors grouped by module name: ``{"lora_unet_…": {"lora_up.weight": …, "alpha": …}}``."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        modules.setdefault(name, {})[part] = tensor
    return modules


def module_name(path: str) -> str:
    """Return the field's name of the module at a dotted path."""
    return PREFIX + path.replace(".", "_")


def adapted_layers(transformer: torch.nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Yield path and layer of every adapted module, in the model's order."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in transformer.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield path, module


def layer_parameters(layer: BaseTunerLayer) -> dict[str, torch.nn.Parameter]:
    """Return a layer's trained parameters by the field's part names."""
    if hasattr(layer, "lora_A"):
        parameters = {
            "lora_down.weight": layer.lora_A[ADAPTER].weight,
            "lora_up.weight": layer.lora_B[ADAPTER].weight,
        }
        if ADAPTER in layer.lora_magnitude_vector:
            parameters["dora_scale"] = layer.lora_magnitude_vector[ADAPTER].weight
        return parameters
    holders = {part: getattr(layer, part, {}) for part in (*LOHA_PARTS, *LOKR_PARTS)}
    return {part: holder[ADAPTER] for part, holder in holders.items() if ADAPTER in holder}


def layer_alpha(layer: BaseTunerLayer) -> float:
    """Return the alpha that a layer is scaled by."""
    return layer.lora_alpha[ADAPTER] if hasattr(layer, "lora_A") else layer.alpha[ADAPTER]


def put_tensors(layer: BaseTunerLayer, parts: Mapping[str, torch.Tensor]) -> None:
    """Have a layer hold these tensors, by the field's part names, in float32, whatever shapes it had.

    Without an alpha it is the rank.
    """
    alpha, rank = alpha_of(parts), rank_of(parts)
    if rank is None:
        # a LoKr of whole matrices is not scaled; the field writes alpha = rank there
        rank = alpha = max(1, round(alpha or layer.r[ADAPTER]))
    values = {part: value for part, value in parts.items() if part != ALPHA}
    for part in set(layer_parameters(layer)) - set(values):
        del getattr(layer, part)[ADAPTER]
    device = layer.get_base_layer().weight.device
    for part, value in values.items():
        value = value.to(device, torch.float32, copy=True)
        parameter = layer_parameters(layer).get(part)
        if parameter is None:
            getattr(layer, part)[ADAPTER] = torch.nn.Parameter(value)
        else:
            # the parameter stays the same object: an optimizer may hold it
            parameter.data = value.reshape(-1) if part == "dora_scale" else value
    layer.r[ADAPTER] = rank
    layer.scaling[ADAPTER] = (alpha or rank) / rank
    alphas = layer.lora_alpha if hasattr(layer, "lora_A") else layer.alpha
    alphas[ADAPTER] = alpha or rank


def rank_of(parts: Mapping[str, torch.Tensor]) -> int | None:
    """Return the rank that a module's tensors have, or None where none of its matrices is a product."""
    for part, dimension in (("lora_down.weight", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
        if part in parts:
            return parts[part].shape[dimension]
    return None


def alpha_of(parts: Mapping[str, torch.Tensor]) -> float | None:
    """Return the alpha among a module's tensors, if there is one."""
    return float(parts[ALPHA]) if ALPHA in parts else None
