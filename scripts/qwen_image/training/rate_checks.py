"""Which settings of the optimizer and of its learning rate do not go together. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qwen_image.adapter.options import network_options
from qwen_image.training.key_values import KeyValueError
from qwen_image.training.optimizer_options import OWN_RATE, Optimizer, named_optimizer, optimizer_arguments
from qwen_image.training.schedule import POLYNOMIAL_END, piecewise_rules, resolve_steps

Wrong = tuple[str, str, str]
"""Key, what was found, how to mend it."""
WITHOUT_WARMUP = ("constant", "piecewise_constant", OWN_RATE)
WITHOUT_FALL = ("constant", "constant_with_warmup")
SMALLEST_FACTOR = 0.01  # below it, learning_rate is meant for an optimizer that does not find its rate
# the schedules for which a key counts
COUNTS_FOR = {
    "lr_scheduler_num_cycles": (
        "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
    ),
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
    yield from _wrong_optimizer(values, defaults)
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
    if law == "polynomial" and values["learning_rate"] <= POLYNOMIAL_END:
        found = f"{values['learning_rate']} is not above {POLYNOMIAL_END}, where lr_scheduler polynomial ends"
        yield "learning_rate", found, "raise it, or use linear"
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


def _wrong_optimizer(values: Mapping, defaults: Mapping) -> Iterator[Wrong]:
    law = values["lr_scheduler"]
    try:
        optimizer = named_optimizer(values["optimizer_type"])
    except KeyValueError as error:
        yield from (("optimizer_type", found, mend) for found, mend in error.problems)
        return
    if law == OWN_RATE and (optimizer is None or optimizer.own_rate is None):
        found = f"{OWN_RATE} leaves the rate to the optimizer, and {values['optimizer_type']} needs to be told it"
        yield "lr_scheduler", found, "set optimizer_type to Adafactor, or choose another lr_scheduler"
        return
    if optimizer is None:  # a class of the user's own; what it takes is seen when it is imported
        return
    try:
        options = optimizer_arguments(optimizer, values["optimizer_args"], law)
    except KeyValueError as error:
        yield from (("optimizer_args", found, mend) for found, mend in error.problems)
        return
    yield from _wrong_own_rate(options, law)
    if law == OWN_RATE and values["learning_rate"] != defaults["learning_rate"]:
        found = f"{values['learning_rate']} changes nothing: lr_scheduler is {law}"
        yield "learning_rate", found, "remove it, or choose another lr_scheduler"
    yield from _wrong_for_its_kind(values, optimizer)


def _wrong_own_rate(options: Mapping, law: str) -> Iterator[Wrong]:
    relative = options.get("relative_step", False)
    if relative != (law == OWN_RATE):
        found = f"relative_step={relative} contradicts lr_scheduler {law}"
        yield "optimizer_args", found, f"remove it; lr_scheduler {OWN_RATE} turns it on, any other turns it off"
    elif options.get("warmup_init") and not relative:
        found = f"warmup_init=True changes nothing: lr_scheduler is {law}"
        yield "optimizer_args", found, f"remove it, or set lr_scheduler to {OWN_RATE}"


def _wrong_for_its_kind(values: Mapping, optimizer: Optimizer) -> Iterator[Wrong]:
    name, law = values["optimizer_type"], values["lr_scheduler"]
    if optimizer.averages and values["ema_decay"] is not None:
        yield "ema_decay", f"{name} keeps an average of the weights by itself", "remove one of the two"
    if optimizer.averages and law not in WITHOUT_FALL:
        found = f"{law} does not go with {name}, whose average takes the place of a falling rate"
        yield "lr_scheduler", found, f"set it to {' or '.join(WITHOUT_FALL)}"
    if optimizer.finds_rate and values["learning_rate"] < SMALLEST_FACTOR:
        found = f"{values['learning_rate']} is a factor of the rate that {name} finds, and would train next to nothing"
        yield "learning_rate", found, "set it to 1"
    if (optimizer.finds_rate or law == OWN_RATE) and _up_ratio(values) != 1:
        found = f"loraplus_lr_ratio changes nothing: {name} finds one rate for all matrices"
        yield "network_args", found, "remove it, or choose another optimizer_type"


def _up_ratio(values: Mapping) -> float:
    try:
        return network_options(values).loraplus_lr_ratio
    except KeyValueError:  # told elsewhere
        return 1.0


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
