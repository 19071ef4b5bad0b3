"""How far two adapters of one module are from each other, and how far rounding alone may bring them.

Changes of weights are compared by their Frobenius norms. A LoRA's are worked out from products of the rank's size, in
float64, so that those of a 20B model take a moment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from qwen_image.adapter.delta import change, scale_of

Parts = Mapping[str, torch.Tensor]
DOWN, UP, MAGNITUDES = "lora_down.weight", "lora_up.weight", "dora_scale"


def size(parts: Parts) -> float:
    """Return the norm of a module's change to its weight; of a DoRA, before its magnitudes are applied."""
    if UP not in parts:
        return float(torch.linalg.norm(change(parts)))
    return _product_norm(scale_of(parts) * parts[UP].double(), parts[DOWN].double())


def distance(first: Parts, second: Parts) -> float:
    """Return the norm of the difference between two changes to a weight, in parts of the first one's size."""
    if first.keys() == second.keys() and all(torch.equal(first[part], second[part]) for part in first):
        return 0.0
    if UP in first and UP in second:
        up = torch.cat([scale_of(first) * first[UP].double(), -scale_of(second) * second[UP].double()], dim=1)
        difference = _product_norm(up, torch.cat([first[DOWN].double(), second[DOWN].double()]))
    else:
        difference = float(torch.linalg.norm(change(first) - change(second)))
    return _share(difference, size(first))


def tolerance(first: Parts, second: Parts) -> float:
    """Return how large `distance` may be where the two differ by rounding alone.

    It is one unit in the last place of the coarser dtype (2^-7 for bf16, 2^-10 for fp16, 2^-23 for fp32), since folding
    alpha in rounds one matrix once; and for what fp16 cannot hold, numbers near 0, the error that this makes.
    """
    matrices = [tensor for parts in (first, second) for tensor in parts.values() if tensor.ndim == 2]
    limits = [torch.finfo(tensor.dtype) for tensor in matrices]
    allowed = max(limit.eps for limit in limits)
    if UP in first and (whole := size(first)):
        smallest = max(limit.smallest_normal * limit.eps for limit in limits)
        norms = [float(torch.linalg.norm(parts[part].double())) for parts in (first, second) for part in (UP, DOWN)]
        counts = [parts[part].numel() for parts in (first, second) for part in (DOWN, UP)]
        lost = sum(norm * smallest * math.sqrt(count) for norm, count in zip(norms, counts, strict=True))
        allowed += lost / whole
    return allowed


def magnitude_distance(first: Parts, second: Parts) -> float:
    """Return the same as `distance` for a DoRA's magnitudes; infinite where only one of the two has them."""
    if (MAGNITUDES in first) != (MAGNITUDES in second):
        return math.inf
    if MAGNITUDES not in first:
        return 0.0
    own, other = first[MAGNITUDES].double().reshape(-1), second[MAGNITUDES].double().reshape(-1)
    if own.shape != other.shape:
        return math.inf
    return _share(float(torch.linalg.norm(own - other)), float(torch.linalg.norm(own)))


def _product_norm(up: torch.Tensor, down: torch.Tensor) -> float:
    """Norm of up @ down, from two products of the rank's size."""
    return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))


def _share(part: float, whole: float) -> float:
    if whole == 0:
        return 0.0 if part == 0 else math.inf
    return part / whole
