"""Learning rates and lengths as pure functions of the absolute step, so that any step can be asked for on its own.

The shapes are those of transformers' schedulers of the same names. Imports no torch.
"""

from __future__ import annotations

import math

LAWS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
POLYNOMIAL_END = 1e-7  # where transformers' polynomial schedule ends


def learning_rate(
    step: int, *, peak: float, law: str, warmup: int, total: int, cycles: int = 1, power: float = 1.0
) -> float:
    """Return the learning rate of a step (from 0) of `total` steps, of which the first `warmup` rise to `peak`."""
    if law == "constant":
        return peak
    if step < warmup:
        return peak * step / max(1, warmup)
    if law == "constant_with_warmup":
        return peak
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if law == "linear":
        return peak * (1 - progress)
    if law == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if law == "cosine_with_restarts":
        return 0.0 if progress >= 1 else peak * 0.5 * (1 + math.cos(math.pi * ((cycles * progress) % 1.0)))
    assert law == "polynomial", law
    return POLYNOMIAL_END + (peak - POLYNOMIAL_END) * (1 - progress) ** power


def resolve_warmup(value: float | str, *, total_steps: int) -> int:
    """Return warm-up steps from a count (100), a share (0.05) or a percentage ("5%").

    A number without a fraction is a count. Raises ValueError for a share of more than the whole.
    """
    if isinstance(value, str):
        share = float(value.removesuffix("%")) / 100
    elif float(value).is_integer():
        return int(value)
    else:
        share = float(value)
    if share > 1:
        raise ValueError(f"{value!r} is more than the whole training")
    return int(share * total_steps)


def steps_per_epoch(batches: int, *, processes: int, accumulation: int) -> int:
    """Return the optimizer steps of one epoch of `batches` batches."""
    return math.ceil(math.ceil(batches / processes) / accumulation)


def total_steps(max_steps: int, max_epochs: int | None, *, steps_in_epoch: int) -> int:
    """Return the optimizer steps of the whole training; epochs win over steps."""
    return max_steps if max_epochs is None else max_epochs * steps_in_epoch
