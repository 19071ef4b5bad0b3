"""Learning rates and lengths as pure functions of the absolute step, so that any step can be asked for on its own.

The shapes are those of transformers' schedulers of the same names; rex is the reflected exponential of
https://arxiv.org/abs/2107.04197. Imports no torch, but for a class of the user's own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen_image.problems import InputError, Problem
from qwen_image.training.optimizer_options import OWN_RATE, named_optimizer, optimizer_arguments

if TYPE_CHECKING:
    from qwen_image.training.arguments import Settings

POLYNOMIAL_END = 1e-7  # where transformers' polynomial schedule ends
REX_ALPHA, REX_BETA, REX_LOWEST = 0.1, 0.9, 0.01  # the field's
TIMESCALE = 10_000  # transformers', where there is no warm-up to take it from
MAKERS = ("transformers.optimization", "diffusers.optimization")  # their functions make schedulers, and nothing else
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate of every step."""

    peak: float
    law: str
    total: int
    """Steps of the training."""
    warmup_steps: int = 0
    decay_steps: int = 0
    """At the end, for warmup_stable_decay."""
    cycles: int = 1
    power: float = 1.0
    timescale: int | None = None
    lowest: float = 0.0
    """As a share of the peak."""
    slow_start: bool = False
    """For adafactor: its warmup_init."""
    rules: tuple[tuple[float, float], ...] = ()
    """For piecewise_constant: up to which step (the last: infinity) the rate is which share of the peak."""
    table: tuple[float, ...] | None = None
    """The rates of a class of the user's own, instead of a law."""

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if self.table is not None:
            return self.table[step]
        if self.law == OWN_RATE:
            # what the optimizer takes by itself, before it scales it by the parameters' size
            return min(1e-6 * (step + 1) if self.slow_start else 1e-2, 1 / math.sqrt(step + 1))
        if self.law == "polynomial" and step >= self.warmup_steps:
            return POLYNOMIAL_END + (self.peak - POLYNOMIAL_END) * (1 - self._progress(step)) ** self.power
        return self.peak * self._factor(step)

    def _factor(self, step: int) -> float:
        law, warmup = self.law, self.warmup_steps
        if law == "constant":
            return 1.0
        if law == "piecewise_constant":
            return next(share for end, share in self.rules if step < end)
        if step < warmup:
            return self._rising(step)
        if law == "constant_with_warmup":
            return 1.0
        if law == "inverse_sqrt":
            timescale = self.timescale or warmup or TIMESCALE
            return 1 / math.sqrt((step + timescale - warmup) / timescale)
        if law == "cosine_with_restarts":
            progress = self._progress(step)
            return 0.0 if progress >= 1 else _cosine((self.cycles * progress) % 1.0)
        return self.lowest + (1 - self.lowest) * self._falling(step)

    def _rising(self, step: int) -> float:
        if self.law == "cosine_warmup_with_min_lr":  # its first step is no lost one
            return (step + 1) / self.warmup_steps
        share = step / self.warmup_steps
        return self.lowest + (1 - self.lowest) * share if self.law in ("warmup_stable_decay", "rex") else share

    def _falling(self, step: int) -> float:
        """Return a number that falls from 1 to 0."""
        if self.law == "linear":
            return 1 - self._progress(step)
        if self.law == "rex":
            left = 1 - self._progress(step)
            return left / (REX_ALPHA + REX_BETA * left)
        if self.law == "cosine_warmup_with_min_lr":
            return _cosine(self.cycles * self._progress(step + 1))
        if self.law == "warmup_stable_decay":
            passed = (step - (self.total - self.decay_steps)) / max(1, self.decay_steps)
            return 0.0 if passed >= 1 else _cosine(self.cycles * max(0.0, passed))
        assert self.law in ("cosine", "cosine_with_min_lr"), self.law
        return _cosine(self.cycles * self._progress(step))

    def _progress(self, step: int) -> float:
        """How much of the time after the warm-up has passed, from 0 to 1."""
        return min(1.0, (step - self.warmup_steps) / max(1, self.total - self.warmup_steps))


def make_schedule(settings: Settings, total_steps: int) -> Schedule:
    """Return the schedule that the settings ask for. Raises InputError for a decay that begins within the warm-up."""
    law, lowest = settings.lr_scheduler, settings.lr_scheduler_min_lr_ratio
    if lowest is None:
        lowest = REX_LOWEST if law == "rex" else 0.0
    schedule = Schedule(
        peak=settings.learning_rate,
        law=law,
        total=total_steps,
        warmup_steps=resolve_steps(settings.lr_warmup_steps, total_steps=total_steps),
        decay_steps=resolve_steps(settings.lr_decay_steps, total_steps=total_steps),
        cycles=settings.lr_scheduler_num_cycles,
        power=settings.lr_scheduler_power,
        timescale=settings.lr_scheduler_timescale,
        lowest=lowest,
        slow_start=law == OWN_RATE and _has_slow_start(settings),
        rules=piecewise_rules(settings.lr_scheduler_args) if law == "piecewise_constant" else (),
        table=_own_table(settings, total_steps) if settings.lr_scheduler_type else None,
    )
    _check_lengths(schedule)
    return schedule


def resolve_steps(value: float | str, *, total_steps: int) -> int:
    """Return a number of steps from a count (100), a share (0.05) or a percentage ("5%").

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
    # 29 % of 100 steps are 28.999… in floating point, and meant as 29
    return int(share * total_steps + 1e-9)


def piecewise_rules(arguments: Sequence[str] | None) -> tuple[tuple[float, float], ...]:
    """Return the rules of ``["step_rules=1:100,0.1:200,0.01"]``: shares of the peak, and before which step each holds.

    The last has no step. Raises ValueError for anything else.
    """
    if not arguments or len(arguments) != 1 or not arguments[0].startswith("step_rules="):
        raise ValueError("piecewise_constant needs one step_rules")
    *timed, last = arguments[0].removeprefix("step_rules=").split(",")
    pairs = [part.split(":") for part in timed]
    rules = [(float(int(step)), float(share)) for share, step in pairs] + [(math.inf, float(last))]
    ends = [end for end, _ in rules]
    if any(share < 0 or not math.isfinite(share) for _, share in rules) or sorted(set(ends)) != ends:
        raise ValueError("the steps must rise and the shares be 0 or more")
    return tuple(rules)


def steps_per_epoch(batches: int, *, processes: int, accumulation: int) -> int:
    """Return the optimizer steps of one epoch of `batches` batches."""
    return math.ceil(math.ceil(batches / processes) / accumulation)


def total_steps(max_steps: int, max_epochs: int | None, *, steps_in_epoch: int) -> int:
    """Return the optimizer steps of the whole training; epochs win over steps."""
    return max_steps if max_epochs is None else max_epochs * steps_in_epoch


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _check_lengths(schedule: Schedule) -> None:
    warmup, decay, total = schedule.warmup_steps, schedule.decay_steps, schedule.total
    if decay and warmup + decay > total:
        found = f"{warmup} steps of warm-up and {decay} of decay, but the training has {total}"
        mend = 'give shares of it, such as "5%"'
        raise InputError([Problem(file="settings", key="lr_decay_steps", found=found, mend=mend)])
    # a few steps to try things out are no mistake
    if warmup > total:
        log.warning("train: the learning rate never reaches its peak: %d steps of warm-up, %d in all", warmup, total)


def _has_slow_start(settings: Settings) -> bool:
    optimizer = named_optimizer(settings.optimizer_type)
    return bool(optimizer_arguments(optimizer, settings.optimizer_args, OWN_RATE).get("warmup_init"))


def _own_table(settings: Settings, total_steps: int) -> tuple[float, ...]:
    """Return the rates that a scheduler class gives, driven once through the whole training without a model."""
    import warnings

    import torch

    from qwen_image.training.own_classes import load_class, options_for

    base = torch.optim.lr_scheduler.LRScheduler
    kind = load_class(settings.lr_scheduler_type, base, "lr_scheduler_type", makers=MAKERS)
    options = options_for(kind, settings.lr_scheduler_args, "lr_scheduler_args", own=("optimizer", "last_epoch"))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=settings.learning_rate)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about an optimizer that makes no steps
            rates = tuple(_driven(kind(optimizer, **options), optimizer, total_steps))
    # what is called is anybody's code, and may fail in any way
    except Exception as error:
        mend = "give lr_scheduler_args what it takes, or name one that follows from the step alone"
        raise InputError([Problem(file="settings", key="lr_scheduler_args", found=str(error), mend=mend)]) from error
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        found, mend = "it gives rates that are no number or below 0", "give lr_scheduler_args that suit the training"
        raise InputError([Problem(file="settings", key="lr_scheduler_type", found=found, mend=mend)])
    return rates


def _driven(scheduler, optimizer, total_steps: int) -> Iterator[float]:
    for step in range(total_steps):
        # before every step but the first: some refuse to go beyond the last
        if step:
            scheduler.step()
        yield float(optimizer.param_groups[0]["lr"])
