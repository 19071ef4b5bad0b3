"""How an adapter starts: random, and as a change of exactly nothing.

Numbers are drawn on the CPU in float32 whatever the device and the base's dtype, so that every machine starts from the
same.
"""

from __future__ import annotations

import math

import torch

from qwen_image.adapter.options import NetworkOptions
from qwen_image.adapter.tensors import ALPHA, rank_of


def start_values(
    kind: str, weight: torch.Tensor, *, rank: int, alpha: float, options: NetworkOptions, random: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return the tensors, by the field's part names, that the adapter of a weight (out, in) starts from.

    The distributions are the field's, so its learning rates hold here too.
    """
    values = _matrices(kind, weight, rank=rank, options=options, random=random)
    # in float64, or 0.3 would not come back as what it was; a LoKr of whole matrices is not scaled
    own = rank if rank_of(values) is None else alpha
    return values | {ALPHA: torch.tensor(own, dtype=torch.float64)}


def divisors(dimension: int, factor: int) -> tuple[int, int]:
    """Return two numbers whose product is the dimension, the smaller first.

    One of them is `factor` if that divides it; otherwise the smaller is the largest divisor up to the square root and,
    unless it is -1, up to `factor`.
    """
    if factor > 0 and dimension % factor == 0:
        small = min(factor, dimension // factor)
    else:
        highest = math.isqrt(dimension) if factor < 0 else min(math.isqrt(dimension), factor)
        small = next(number for number in range(highest, 0, -1) if dimension % number == 0)
    return small, dimension // small


def _matrices(
    kind: str, weight: torch.Tensor, *, rank: int, options: NetworkOptions, random: torch.Generator
) -> dict[str, torch.Tensor]:
    size_out, size_in = weight.shape
    if kind in ("lora", "dora"):
        values = {
            "lora_down.weight": _kaiming((rank, size_in), random),
            "lora_up.weight": torch.zeros(size_out, rank),
        }
        if kind == "dora":
            # measured on the weight's own device, as peft measures it in each step: the two then cancel exactly
            values["dora_scale"] = torch.linalg.norm(weight.detach().float(), dim=1)[:, None]
        return values
    if kind == "loha":
        return {
            "hada_w1_a": 0.1 * torch.randn(size_out, rank, generator=random),
            "hada_w1_b": torch.randn(rank, size_in, generator=random),
            "hada_w2_a": torch.zeros(size_out, rank),
            "hada_w2_b": torch.randn(rank, size_in, generator=random),
        }
    return _lokr(size_out, size_in, rank=rank, options=options, random=random)


def _lokr(
    size_out: int, size_in: int, *, rank: int, options: NetworkOptions, random: torch.Generator
) -> dict[str, torch.Tensor]:
    """A factor is a product of two matrices where the rank is below half of its longer side, else it is whole."""
    (out_1, out_2), (in_1, in_2) = divisors(size_out, options.factor), divisors(size_in, options.factor)
    values = {}
    if options.decompose_both and rank < max(out_1, in_1) / 2:
        values["lokr_w1_a"] = _kaiming((out_1, rank), random)
        values["lokr_w1_b"] = _kaiming((rank, in_1), random)
    else:
        values["lokr_w1"] = _kaiming((out_1, in_1), random)
    if rank < max(out_2, in_2) / 2:
        values["lokr_w2_a"] = _kaiming((out_2, rank), random)
        values["lokr_w2_b"] = torch.zeros(rank, in_2)
    else:
        values["lokr_w2"] = torch.zeros(out_2, in_2)
    return values


def _kaiming(shape: tuple[int, int], random: torch.Generator) -> torch.Tensor:
    return torch.nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=random)
