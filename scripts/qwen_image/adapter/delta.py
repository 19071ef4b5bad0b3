"""What an adapter does to a weight, from the tensors of its file: the field's formulas, in float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from qwen_image.adapter.tensors import ALPHA, LOHA_PARTS, rank_of

LORA_PARTS = {"lora_down.weight", "lora_up.weight"}
LOKR_FACTORS = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}), ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})


def kind_of(parts: Iterable[str]) -> str | None:
    """Return the kind of adapter that a module's tensors with these part names are, None where they are none."""
    names = set(parts) - {ALPHA}
    if names == LORA_PARTS:
        return "lora"
    if names == LORA_PARTS | {"dora_scale"}:
        return "dora"
    if names == set(LOHA_PARTS):
        return "loha"
    if any(names == first | second for first in LOKR_FACTORS[0] for second in LOKR_FACTORS[1]):
        return "lokr"
    return None


def change(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return what a module's tensors add to its weight, (out, in); of a DoRA, before its magnitudes are applied."""
    tensors = {part: tensor.float() for part, tensor in parts.items()}
    kind = kind_of(tensors)
    if kind in ("lora", "dora"):
        product = tensors["lora_up.weight"] @ tensors["lora_down.weight"]
    elif kind == "loha":
        first = tensors["hada_w1_a"] @ tensors["hada_w1_b"]
        product = first * (tensors["hada_w2_a"] @ tensors["hada_w2_b"])
    elif kind == "lokr":
        product = torch.kron(_factor(tensors, "lokr_w1"), _factor(tensors, "lokr_w2"))
    else:
        raise AssertionError(f"no kind of adapter has these parts: {sorted(parts)}")
    return scale_of(parts) * product


def scale_of(parts: Mapping[str, torch.Tensor]) -> float:
    """Return alpha / rank; 1 without an alpha, and for a LoKr of whole matrices."""
    rank = rank_of(parts)
    return float(parts[ALPHA]) / rank if rank and ALPHA in parts else 1.0


def merged(weight: torch.Tensor, parts: Mapping[str, torch.Tensor], multiplier: float = 1.0) -> torch.Tensor:
    """Return a weight (out, in) with a module's tensors merged into it, in float32.

    A DoRA gives each row (or, by its shape, each column) of the changed weight the length that it holds.
    """
    weight, added = weight.float(), change(parts)
    if "dora_scale" in parts:
        magnitudes = parts["dora_scale"].float()
        along = 1 if magnitudes.shape[0] == weight.shape[0] else 0
        total = weight + added
        # a row of zeros stays one
        lengths = torch.linalg.norm(total, dim=along, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        added = total * (magnitudes / lengths) - weight
    return weight + multiplier * added


def _factor(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name in tensors:
        return tensors[name]
    return tensors[f"{name}_a"] @ tensors[f"{name}_b"]
