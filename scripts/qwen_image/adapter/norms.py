"""The size of an adapter's change to each weight, kept below a limit (``scale_weight_norms``)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qwen_image.adapter.tensors import ADAPTER, adapted_layers, layer_parameters


@torch.no_grad()
def limit_weight_norms(transformer: torch.nn.Module, limit: float) -> int:
    """Scale each module's change to its weight down to this Frobenius norm where it exceeds it; returns how many did.

    The factor is spread evenly over the module's matrices, as the field does.
    """
    ratios = []
    for _, layer in adapted_layers(transformer):
        parameters = layer_parameters(layer)
        # 1 where nothing is to be done, so that the device need not be asked
        ratio = (limit / _change_norm(parameters, layer.scaling[ADAPTER])).clamp(max=1.0)
        for parameter in parameters.values():
            parameter.mul_(ratio ** (1 / len(parameters)))
        ratios.append(ratio)
    return int((torch.stack(ratios) < 1).sum())


def _change_norm(parts: Mapping[str, torch.Tensor], scale: float) -> torch.Tensor:
    if "lora_up.weight" in parts:
        return scale * _product_norm(parts["lora_up.weight"], parts["lora_down.weight"])
    if "hada_w1_a" in parts:
        first = parts["hada_w1_a"] @ parts["hada_w1_b"]
        return scale * torch.linalg.norm(first * (parts["hada_w2_a"] @ parts["hada_w2_b"]))
    norm = scale
    for name in ("lokr_w1", "lokr_w2"):
        whole = parts.get(name)
        norm = norm * (
            _product_norm(parts[f"{name}_a"], parts[f"{name}_b"]) if whole is None else torch.linalg.norm(whole)
        )
    return norm


def _product_norm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Norm of left @ right, from products of the rank's size instead of the weight's."""
    return ((left.T @ left) * (right @ right.T)).sum().clamp_min(0).sqrt()
