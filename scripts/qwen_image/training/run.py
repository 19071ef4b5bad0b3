"""One training while it runs: what it works with, how far it is, and which weights count."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_image.training.optimizers import evaluation_weights

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from diffusers import QwenImageTransformer2DModel

    from qwen_image.dataset.config import DatasetSettings
    from qwen_image.training.arguments import Settings
    from qwen_image.training.ema import Average
    from qwen_image.training.items import TrainingItem
    from qwen_image.training.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long the training is."""

    train_items: int
    """Visits of an epoch: items times their repeats."""
    batches_per_epoch: int
    """Of all processes together."""
    steps_per_epoch: int
    """Optimizer steps."""
    total_steps: int
    epochs: int
    """The last one may be cut short by the number of steps."""


@dataclass(kw_only=True)
class Progress:
    """How far the training is: all that changes from step to step, but for the weights and the optimizer."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Of the step done last, from 1."""
    skipped_steps: int = 0
    """Of the steps, those whose loss was no number."""
    recent_losses: deque[float] = field(default_factory=deque)
    """Of the last epoch's worth of steps."""
    best_validation: float | None = None

    @property
    def average_loss(self) -> float:
        """Mean of the recent losses; NaN while there are none."""
        return math.fsum(self.recent_losses) / len(self.recent_losses) if self.recent_losses else math.nan


@dataclass(kw_only=True)
class TrainingRun:
    """Everything the loop works with."""

    settings: Settings
    accelerator: Accelerator
    datasets: Mapping[int, DatasetSettings]
    items: Sequence[TrainingItem]
    held_out: Sequence[TrainingItem]
    """Items that are not trained on but validated with."""
    plan: Plan
    schedule: Schedule
    metadata: Mapping[str, str]
    """Of every file that the training writes."""
    made_from: Mapping[str, object]
    """Settings and inputs that bear on the result; a state of the same goes on to the same."""
    transformer: QwenImageTransformer2DModel
    model: torch.nn.Module
    """The transformer as accelerate wraps it: the one to call."""
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: Average | None
    progress: Progress

    @property
    def output_dir(self) -> Path:
        """Where the files go."""
        return Path(self.settings.output_dir)

    @contextlib.contextmanager
    def kept_weights(self) -> Iterator[None]:
        """Have the adapter hold the weights that are saved, validated and sampled, with dropout off."""
        averaged = self.average.in_place() if self.average is not None else contextlib.nullcontext()
        self.transformer.eval()
        try:
            with evaluation_weights(self.optimizer), averaged:
                yield
        finally:
            self.transformer.train()
