"""Which settings of the optimizer and of its learning rate do not go together. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qwen_image.training.key_values import KeyValueError
from qwen_image.training.optimizer_options import chooses_its_rate, named_optimizer, optimizer_arguments
from qwen_image.training.schedule import piecewise_rules, resolve_steps

Wrong = tuple[str, str, str]
"""Key, what was found, how to mend it."""
WITHOUT_WARMUP = ("constant", "piecewise_constant")
# the schedules for which a key counts
COUNTS_FOR = {
    "lr_scheduler_num_cycles": ("cosine_with_restarts",),
    "lr_scheduler_power": ("polynomial",),
    "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_decay_steps": ("warmup_stable_decay",),
    "lr_scheduler_min_lr_ratio": (
        "linear", "cosine", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "rex",
    ),
}  # fmt: skip
NEEDED_BY = {
    "cosine_with_min_lr": "lr_scheduler_min_lr_ratio",
    "cosine_warmup_with_min_lr": "lr_scheduler_min_lr_ratio",
    "warmup_stable_decay": "lr_decay_steps",
    "piecewise_constant": "lr_scheduler_args",
}


def wrong_rates(values: Mapping, defaults: Mapping) -> Iterator[Wrong]:
    """Yield what is wrong. Both mappings hold every key."""
    yield from _wrong_optimizer(values)
    if values["lr_scheduler_type"]:
        yield from _beside_an_own_class(values, defaults)
        return
    yield from _wrong_steps(values)
    law = values["lr_scheduler"]
    for key, laws in COUNTS_FOR.items():
        if values[key] != defaults[key] and law not in laws:
            yield (
                key,
                f"{values[key]!r} changes nothing: lr_scheduler is {law}",
                f"remove it, or use {' or '.join(laws)}",
            )
    needed = NEEDED_BY.get(law)
    if needed is not None and values[needed] == defaults[needed]:
        yield needed, f"is not set, and lr_scheduler {law} needs it", "set it, or choose another lr_scheduler"
    elif law == "piecewise_constant":
        try:
            piecewise_rules(values["lr_scheduler_args"])
        except ValueError as error:
            yield "lr_scheduler_args", str(error), 'give ["step_rules=1:100,0.1:200,0.01"]'
    elif values["lr_scheduler_args"]:
        yield "lr_scheduler_args", f"changes nothing: lr_scheduler is {law}", "remove it, or set lr_scheduler_type"


def _wrong_optimizer(values: Mapping) -> Iterator[Wrong]:
    try:
        optimizer = named_optimizer(values["optimizer_type"])
    except KeyValueError as error:
        yield from (("optimizer_type", found, mend) for found, mend in error.problems)
        return
    if optimizer is None:  # a class of the user's own; what it takes is seen when it is imported
        return
    try:
        optimizer_arguments(optimizer, values["optimizer_args"])
    except KeyValueError as error:
        yield from (("optimizer_args", found, mend) for found, mend in error.problems)
        return
    if optimizer.averages and values["ema_decay"] is not None:
        found = f"{values['optimizer_type']} keeps an average of the weights by itself"
        yield "ema_decay", found, "remove one of the two"
    if chooses_its_rate(values["optimizer_type"], values["optimizer_args"]) and values["lr_scheduler"] != "constant":
        found = "changes nothing: with relative_step=True the optimizer sets its own rate"
        yield "lr_scheduler", found, "set lr_scheduler to constant, or remove relative_step"


def _wrong_steps(values: Mapping) -> Iterator[Wrong]:
    for key in ("lr_warmup_steps", "lr_decay_steps"):
        try:
            resolve_steps(values[key], total_steps=1)
        except ValueError as error:
            yield key, str(error), 'give a count of steps (100) or a share below 1 (0.05 or "5%")'
            return
    warmup, law = values["lr_warmup_steps"], values["lr_scheduler"]
    if law in WITHOUT_WARMUP and warmup not in (0, "0%"):
        found = f"{warmup!r} with lr_scheduler {law}, which has no warm-up"
        yield "lr_warmup_steps", found, "set lr_scheduler to constant_with_warmup, or lr_warmup_steps to 0"


def _beside_an_own_class(values: Mapping, defaults: Mapping) -> Iterator[Wrong]:
    """A class of the user's own is told everything by lr_scheduler_args."""
    keys = ("lr_scheduler", "lr_warmup_steps", *COUNTS_FOR)
    for key in keys:
        if values[key] != defaults[key]:
            yield key, f"{values[key]!r} changes nothing: lr_scheduler_type is set", "remove one of the two"
