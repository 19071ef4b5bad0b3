"""The loss of items that are not trained on: which they are, and a measure that is the same each time.

Items are held out by their names alone, and their noise follows from their names, so that the loss can be compared
between steps and between trainings, whatever their seed, law of noise levels or number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from qwen_image.problems import InputError, Problem
from qwen_image.training.flow import noisy_latents, predict_velocity
from qwen_image.training.items import LATENT_PREFIX, TEXT_PREFIX, TrainingItem
from qwen_image.training.loading import pad_text, read_tensor
from qwen_image.training.randomness import derived_seed, generator

if TYPE_CHECKING:
    from qwen_image.training.run import TrainingRun

LEVELS = (0.125, 0.375, 0.625, 0.875)
"""Noise levels at which every held-out item is measured: the middles of four equal parts of the range."""


def split_items(items: Sequence[TrainingItem], share: float) -> tuple[list[TrainingItem], list[TrainingItem]]:
    """Return the items to train on and those held out. Raises InputError when either would be empty."""
    if not share:
        return list(items), []
    trained: list[TrainingItem] = []
    held_out: list[TrainingItem] = []
    for item in items:
        (held_out if derived_seed("held out", item.key) < share * 2**63 else trained).append(item)
    if not held_out or not trained:
        what = "holds out no item" if not held_out else "holds out every item"
        mend = "choose another share, or remove the key: a dataset this small has none to spare"
        found = f"{share} {what} of {len(items)} (each is held out by its name)"
        raise InputError([Problem(file="settings", key="validation_split", found=found, mend=mend)])
    return trained, held_out


def validation_loss(run: TrainingRun) -> float:
    """Return the mean squared error of the velocity over all held-out items and LEVELS, without any weights.

    All processes take part, and all get the same number. Call it with the weights that are kept in place.
    """
    from accelerate.utils import gather_object

    accelerator = run.accelerator
    batches = list(_batches(run))
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    with torch.no_grad():
        losses = [loss for items, level in mine for loss in _losses(run, items, level)]
    # a sum of exact numbers in a fixed order: how many processes shared the work does not show
    everyone = sorted(gather_object(losses))
    return math.fsum(everyone) / len(everyone)


def _batches(run: TrainingRun) -> Iterator[tuple[list[TrainingItem], float]]:
    """Yield the held-out items of one dataset and bucket, as many together as in training, at each level."""
    for (dataset, _), group in groupby(sorted(run.held_out, key=_bucket), key=_bucket):
        items, size = list(group), run.datasets[dataset].batch_size
        for start in range(0, len(items), size):
            for level in LEVELS:
                yield items[start : start + size], level


def _bucket(item: TrainingItem) -> tuple:
    return item.dataset, item.bucket


def _losses(run: TrainingRun, items: Sequence[TrainingItem], level: float) -> list[float]:
    device, dtype = run.accelerator.device, run.transformer.txt_in.weight.dtype
    latents = [read_tensor(item.latents, LATENT_PREFIX).float() for item in items]
    noises = [
        torch.randn(latent.shape, generator=generator("validation noise", item.key, str(level)))
        for item, latent in zip(items, latents, strict=True)
    ]
    latents_bc1hw, noise_bc1hw = torch.stack(latents).to(device), torch.stack(noises).to(device)
    # an item's first caption, never the empty one
    text_bld, mask_bl = pad_text([read_tensor(item.texts[0], TEXT_PREFIX) for item in items])
    t_b = torch.full((len(items),), level, device=device)
    # the model as accelerate wraps it brings the mixed precision along; gradients are off, so no process waits
    velocity_bc1hw = predict_velocity(
        run.model,
        noisy_latents(latents_bc1hw, noise_bc1hw, t_b),
        t_b,
        text_bld.to(device, dtype),
        None if mask_bl is None else mask_bl.to(device),
    )
    error_bc1hw = velocity_bc1hw.float() - (noise_bc1hw - latents_bc1hw)
    return error_bc1hw.square().flatten(1).mean(1).tolist()
