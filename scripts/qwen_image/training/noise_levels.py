"""The noise level of each visit to an item, and what it counts in the loss.

A visit's level follows from the seed, the epoch, the item and the repeat alone; with num_timestep_buckets also from
which items there are, for those of a dataset share the strata of an epoch among them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from qwen_image.cache.names import VAE_SCALE
from qwen_image.problems import InputError, Problem
from qwen_image.training.noise_laws import LogitNormal, Part, cut, law_parts, level_at, level_weight
from qwen_image.training.randomness import generator

if TYPE_CHECKING:
    from qwen_image.dataset.config import DatasetSettings
    from qwen_image.training.arguments import Settings
    from qwen_image.training.items import TrainingItem


class NoiseLevels:
    """Draws the levels of a training; processes and data-loader workers each hold one and draw the same."""

    def __init__(
        self, settings: Settings, items: Sequence[TrainingItem], datasets: Mapping[int, DatasetSettings]
    ) -> None:
        """Prepare the law for each picture size. Raises InputError where the law has next to nothing in the range."""
        self._settings = settings
        self._items = items
        self._datasets = datasets
        self._low, self._high = settings.min_timestep or 0, settings.max_timestep or 1000
        self._is_cut = settings.preserve_distribution_shape
        strata = settings.num_timestep_buckets or 0
        self._strata = Strata(strata, settings.seed, items, datasets) if strata > 1 else None
        self._laws: dict[int, tuple[Part, ...]] = {}
        for tokens in sorted({image_tokens(item.bucket) for item in items}):
            self._law(tokens)

    def level(self, index: int, epoch: int, repeat: int, tokens: int) -> float:
        """Return t in [0, 1] for one visit to the item at `index`, whose picture has so many image tokens."""
        item = self._items[index]
        random = generator("noise level", self._settings.seed, epoch, item.dataset, item.key, repeat)
        law = self._law(tokens)
        if self._strata is None and len(law) == 1 and not self._is_cut:
            kind = law[0].kind
            draw = torch.randn if isinstance(kind, LogitNormal) else torch.rand
            t = kind.of_draw(draw((), generator=random, dtype=torch.float64).item())
        else:
            u = torch.rand((), generator=random, dtype=torch.float64).item()
            if self._strata is not None:
                u = (self._strata.of(index, epoch, repeat) + u) / self._strata.count
            t = level_at(law, u)
        return self._in_range(t)

    def weight(self, t: float) -> float:
        """Return what a level counts in the loss."""
        return level_weight(self._settings.weighting_scheme, t)

    def visit_weight(self, index: int, t: float) -> float:
        """Return what a visit counts in the loss: its level's weight times its dataset's."""
        return self.weight(t) * self._datasets[self._items[index].dataset].loss_weight

    def _law(self, tokens: int) -> tuple[Part, ...]:
        if tokens not in self._laws:
            law = law_parts(self._settings, tokens)
            if self._is_cut:
                law = cut(law, self._low / 1000, self._high / 1000)
            if not law:
                raise InputError([self._nothing_there(tokens)])
            self._laws[tokens] = law
        return self._laws[tokens]

    def _in_range(self, t: float) -> float:
        """Squeeze a level into the range, or, of a law that was cut to it, mend the last digit."""
        if self._is_cut:
            t = min(max(t, self._low / 1000), self._high / 1000)
        else:
            t = (self._low + t * (self._high - self._low)) / 1000
        if self._settings.timestep_sampling != "sigma":
            return t
        # the next of the grid of thousandths, whose lowest is one above the range's lower end
        return min(max(math.ceil(1000 * t), self._low + 1), self._high) / 1000

    def _nothing_there(self, tokens: int) -> Problem:
        found = (
            f"{self._settings.timestep_sampling} trains next to nothing between min_timestep {self._low} and "
            f"max_timestep {self._high} for pictures of {tokens} image tokens"
        )
        mend = "widen the range, or remove the key: then the whole law is squeezed into the range"
        return Problem(file="settings", key="preserve_distribution_shape", found=found, mend=mend)


class Strata:
    """Spreads the visits of an epoch evenly over equal parts of the law, dataset by dataset.

    Of n visits each of K strata gets n / K, rounded down or up; which visit gets which is shuffled anew each epoch.
    """

    def __init__(
        self, count: int, seed: int, items: Sequence[TrainingItem], datasets: Mapping[int, DatasetSettings]
    ) -> None:
        """Number the visits of each dataset, by the items' names."""
        self.count = count
        self._seed = seed
        self._items = items
        self._visits: Counter[int] = Counter()
        self._first: dict[int, int] = {}
        for index in sorted(range(len(items)), key=lambda index: items[index].key):
            dataset = items[index].dataset
            self._first[index] = self._visits[dataset]
            self._visits[dataset] += datasets[dataset].num_repeats
        self._epoch = 0
        self._shuffled: dict[int, tuple[torch.Tensor, int]] = {}

    def of(self, index: int, epoch: int, repeat: int) -> int:
        """Return the stratum of a visit, from 0."""
        if epoch != self._epoch:
            # an epoch's order is worked out once by each worker
            self._epoch, self._shuffled = epoch, {}
        dataset = self._items[index].dataset
        if dataset not in self._shuffled:
            self._shuffled[dataset] = self._shuffle(dataset)
        places, offset = self._shuffled[dataset]
        # whole numbers, so that no rounding moves a visit; the offset gives strata that go short in turn
        return (int(places[self._first[index] + repeat]) * self.count + offset) // self._visits[dataset]

    def _shuffle(self, dataset: int) -> tuple[torch.Tensor, int]:
        random = generator("strata", self._seed, self._epoch, dataset)
        places = torch.randperm(self._visits[dataset], generator=random)
        return places, int(torch.randint(self.count, (), generator=random))


def image_tokens(bucket: tuple[int, int]) -> int:
    """Return how many tokens a picture of (W, H) pixels has."""
    width, height = bucket
    return (width // VAE_SCALE) * (height // VAE_SCALE) // 4
