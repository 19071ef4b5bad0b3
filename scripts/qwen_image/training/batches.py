"""Which items each step trains on: a pure function of the items, the seed and the step. No torch, no files.

An epoch visits every item `num_repeats` times. A batch holds items of one dataset and one bucket; the last batch of a
bucket may be short.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qwen_image.dataset.config import DatasetSettings
from qwen_image.training.items import TrainingItem
from qwen_image.training.randomness import derived_seed
from qwen_image.training.schedule import steps_per_epoch


class Draw(NamedTuple):
    """One visit to an item."""

    item: int
    """Position in the list of items."""
    repeat: int
    """Which of its `num_repeats` visits of the epoch, from 0."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one process computes at a time."""

    epoch: int
    """From 1."""
    position: int
    """Among this process's batches of the epoch, from 0."""
    draws: tuple[Draw, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: the batches whose gradients it accumulates."""

    number: int
    """From 1."""
    epoch: int
    """From 1."""
    batches: tuple[Batch, ...]
    ends_epoch: bool


def training_steps(
    items: Sequence[TrainingItem],
    datasets: Mapping[int, DatasetSettings],
    *,
    seed: int,
    accumulation: int,
    total: int,
    done: int = 0,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[Step]:
    """Yield one process's optimizer steps after the first `done` ones, `total` with those, epoch after epoch."""
    in_epoch = steps_per_epoch(batches_per_epoch(items, datasets), processes=processes, accumulation=accumulation)
    # whole epochs that are done are not drawn up again
    epoch = done // in_epoch
    number = epoch * in_epoch
    while number < total:
        epoch += 1
        mine = share(epoch_batches(items, datasets, seed=seed, epoch=epoch), rank=rank, processes=processes)
        batches = [Batch(epoch, position, draws) for position, draws in enumerate(mine)]
        for start in range(0, len(batches), accumulation):
            number += 1
            group = tuple(batches[start : start + accumulation])
            if number > done:
                yield Step(number, epoch, group, ends_epoch=start + accumulation >= len(batches))
            if number == total:
                return


def epoch_batches(
    items: Sequence[TrainingItem], datasets: Mapping[int, DatasetSettings], *, seed: int, epoch: int
) -> list[tuple[Draw, ...]]:
    """Return the batches of one epoch for all processes together, in their order.

    First the items of each bucket are shuffled and cut into batches, then the batches.
    """
    shuffler = random.Random(derived_seed(seed, "order", epoch))
    buckets: dict[tuple, list[Draw]] = {}
    for index, item in enumerate(items):
        repeats = range(datasets[item.dataset].num_repeats)
        buckets.setdefault((item.dataset, item.bucket), []).extend(Draw(index, repeat) for repeat in repeats)
    batches: list[tuple[Draw, ...]] = []
    # sorted, so that the order of the items' list does not matter to the draws
    for (dataset, _), draws in sorted(buckets.items()):
        shuffler.shuffle(draws)
        size = datasets[dataset].batch_size
        batches += [tuple(draws[start : start + size]) for start in range(0, len(draws), size)]
    shuffler.shuffle(batches)
    return batches


def batches_per_epoch(items: Sequence[TrainingItem], datasets: Mapping[int, DatasetSettings]) -> int:
    """Return the number of batches of an epoch, for all processes together."""
    return len(epoch_batches(items, datasets, seed=0, epoch=1))


def share(batches: Sequence[tuple[Draw, ...]], *, rank: int, processes: int) -> list[tuple[Draw, ...]]:
    """Return one process's batches: every n-th, wrapping round to the first ones so that all have equally many."""
    each = -(-len(batches) // processes)
    return [batches[(rank + position * processes) % len(batches)] for position in range(each)]
