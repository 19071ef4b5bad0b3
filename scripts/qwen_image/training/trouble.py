"""What happens to a step whose loss or gradient is no number: it is skipped and its items are named, a few times."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from qwen_image.problems import InputError, Problem

if TYPE_CHECKING:
    from qwen_image.training.batches import Step
    from qwen_image.training.run import TrainingRun

log = logging.getLogger(__name__)


def skip_or_stop(run: TrainingRun, step: Step, local_loss: float, grad_norm: float) -> None:
    """Count the step as skipped and say which items it had.

    Raises InputError that names them when there were too many such steps; the last good state stays. All processes
    take part, and all decide the same.
    """
    run.progress.skipped_steps += 1
    problems = _suspects(run, step, local_loss, grad_norm)
    limit = run.settings.max_skipped_steps
    if run.progress.skipped_steps > limit:
        raise InputError(problems)
    names = ", ".join(problem.key for problem in problems)
    log.warning(
        "train: step %d is skipped, its loss or gradient was no number (items: %s); %d of %d such steps",
        step.number, names, run.progress.skipped_steps, limit,
    )  # fmt: skip


def _suspects(run: TrainingRun, step: Step, local_loss: float, grad_norm: float) -> list[Problem]:
    """Return a problem for each item of the processes whose own loss is bad, or else of all."""
    from accelerate.utils import gather_object

    items = [run.items[draw.item] for batch in step.batches for draw in batch.draws]
    everyone = gather_object([(math.isfinite(local_loss), item.latents.path, item.name) for item in items])
    suspects = [entry for entry in everyone if not entry[0]] or everyone
    found = f"the loss or its gradient was no number at step {step.number} (gradient norm {grad_norm})"
    mend = "lower learning_rate; if it is always this item, look at its picture and caption and cache it again"
    return [Problem(file=path, key=name, found=found, mend=mend) for _, path, name in sorted(set(suspects))]
