"""The optimizers by name, and what ``optimizer_args`` may say of each. No torch here: a config is checked with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qwen_image.problems import Nearest
from qwen_image.training.key_values import KeyValueError, is_number, read_key_values

OWN_RATE = "adafactor"  # the lr_scheduler that leaves the rate to the optimizer
Check = tuple[Callable[[object], bool], str]


def _numbers(count: int, accepts: Callable[[float], bool]) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, list | tuple)
        and len(value) == count
        and all(is_number(one) and accepts(one) for one in value)
    )


FLAG: Check = (lambda value: isinstance(value, bool), "True or False")
AMOUNT: Check = (lambda value: is_number(value) and value >= 0, "a number of 0 or more")
POSITIVE: Check = (lambda value: is_number(value) and value > 0, "a number above 0")
NUMBER: Check = (is_number, "a number")
SHARE: Check = (lambda value: is_number(value) and 0 <= value < 1, "a number from 0 to below 1")
SHARE_OR_NONE: Check = (lambda value: value is None or SHARE[0](value), "a number from 0 to below 1, or None")
COUNT: Check = (lambda value: is_number(value) and value >= 0 and int(value) == value, "a whole number")
BETAS: Check = (_numbers(2, lambda beta: 0 <= beta < 1), "two numbers below 1, such as (0.9,0.999)")
THREE_BETAS: Check = (_numbers(3, lambda beta: 0 <= beta < 1), "three numbers below 1, such as (0.9,0.999,0.9999)")
TWO_POSITIVE: Check = (_numbers(2, lambda value: value > 0), "two numbers above 0, such as (1e-30,1e-3)")

_ADAM = {"weight_decay": AMOUNT, "betas": BETAS, "eps": POSITIVE, "amsgrad": FLAG}


@dataclass(frozen=True)
class Optimizer:
    """One that can be asked for by name."""

    path: str
    """Where its class is."""
    arguments: Mapping[str, Check]
    """What optimizer_args may set."""
    defaults: Mapping[str, object] | None = None
    """What is set unless optimizer_args says otherwise, where the library's own default would not do."""
    averages: bool = False
    """Whether it keeps an average of the weights by itself."""
    finds_rate: bool = False
    """Whether learning_rate is but a factor of the rate that it finds, one for all parameters."""
    own_rate: Mapping[str, object] | None = None
    """The defaults when lr_scheduler leaves the rate to the optimizer; None where it cannot."""


OPTIMIZERS = {
    "adamw": Optimizer("torch.optim.AdamW", _ADAM),
    "adam": Optimizer("torch.optim.Adam", _ADAM),
    "sgd": Optimizer(
        "torch.optim.SGD", {"momentum": AMOUNT, "dampening": AMOUNT, "weight_decay": AMOUNT, "nesterov": FLAG}
    ),
    "adamw8bit": Optimizer("bitsandbytes.optim.AdamW8bit", {"weight_decay": AMOUNT, "betas": BETAS, "eps": POSITIVE}),
    "lion8bit": Optimizer("bitsandbytes.optim.Lion8bit", {"weight_decay": AMOUNT, "betas": BETAS}),
    "adafactor": Optimizer(
        "transformers.Adafactor",
        {
            "eps": TWO_POSITIVE, "clip_threshold": POSITIVE, "decay_rate": NUMBER, "beta1": SHARE_OR_NONE,
            "weight_decay": AMOUNT, "scale_parameter": FLAG, "relative_step": FLAG, "warmup_init": FLAG,
        },
        {"relative_step": False, "scale_parameter": False},
        own_rate={"relative_step": True, "scale_parameter": True},
    ),
    "lion": Optimizer(
        "pytorch_optimizer.Lion", {"betas": BETAS, "weight_decay": AMOUNT, "weight_decouple": FLAG, "fixed_decay": FLAG}
    ),
    "came": Optimizer(
        "pytorch_optimizer.CAME",
        {
            "betas": THREE_BETAS, "weight_decay": AMOUNT, "weight_decouple": FLAG, "fixed_decay": FLAG,
            "clip_threshold": POSITIVE, "ams_bound": FLAG, "eps1": POSITIVE, "eps2": POSITIVE,
        },
    ),
    "prodigy": Optimizer(
        "pytorch_optimizer.Prodigy",
        {
            "betas": BETAS, "beta3": SHARE_OR_NONE, "d0": POSITIVE, "d_coef": POSITIVE, "growth_rate": POSITIVE,
            "weight_decay": AMOUNT, "weight_decouple": FLAG, "fixed_decay": FLAG, "bias_correction": FLAG,
            "safeguard_warmup": FLAG, "eps": POSITIVE,
        },
        finds_rate=True,
    ),
    "adamwschedulefree": Optimizer(
        "pytorch_optimizer.ScheduleFreeAdamW",
        {
            "betas": BETAS, "weight_decay": AMOUNT, "r": AMOUNT, "weight_lr_power": AMOUNT, "warmup_steps": COUNT,
            "decoupling_c": COUNT, "ams_bound": FLAG, "eps": POSITIVE,
        },
        averages=True,
    ),
    "sgdschedulefree": Optimizer(
        "pytorch_optimizer.ScheduleFreeSGD",
        {
            "momentum": SHARE, "weight_decay": AMOUNT, "r": AMOUNT, "weight_lr_power": AMOUNT, "warmup_steps": COUNT,
            "eps": POSITIVE,
        },
        averages=True,
    ),
    "radamschedulefree": Optimizer(
        "pytorch_optimizer.ScheduleFreeRAdam",
        {
            "betas": BETAS, "weight_decay": AMOUNT, "r": AMOUNT, "weight_lr_power": AMOUNT, "silent_sgd_phase": FLAG,
            "eps": POSITIVE,
        },
        averages=True,
    ),
}  # fmt: skip
ALIASES = {
    "schedulefreeadamw": "adamwschedulefree",
    "schedulefreesgd": "sgdschedulefree",
    "schedulefreeradam": "radamschedulefree",
}
REFUSED = {
    "pagedadamw8bit": "its paged memory can be neither saved nor restored; use AdamW8bit",
    "pagedadamw": "its paged memory can be neither saved nor restored; use AdamW or AdamW8bit",
    "pagedlion8bit": "its paged memory can be neither saved nor restored; use Lion8bit",
}


def named_optimizer(name: str) -> Optimizer | None:
    """Return the optimizer of this name, in any case, or by its class's path; None for the path of another class.

    Raises KeyValueError for a name that is neither.
    """
    short = name.lower()
    if short in REFUSED:
        raise KeyValueError([(f"{name!r} is not supported", REFUSED[short])])
    if "." in name:
        # the same class may be written with the module that defines it, as metadata does
        return next((one for one in OPTIMIZERS.values() if _is_path_of(short, one.path.lower())), None)
    key = ALIASES.get(short, short)
    if key in OPTIMIZERS:
        return OPTIMIZERS[key]
    otherwise = f"use one of {', '.join(OPTIMIZERS)}, or package.module.Class"
    mend = Nearest(short, [*OPTIMIZERS, *ALIASES], otherwise)
    raise KeyValueError([(f"{name!r} is no optimizer", mend)])


def optimizer_arguments(optimizer: Optimizer, arguments: Sequence[str] | None, law: str) -> dict[str, object]:
    """Return the settings of ``["weight_decay=0.1", "betas=(0.9,0.99)"]`` with this optimizer's defaults.

    `law` is lr_scheduler, which may leave the rate to the optimizer. Raises KeyValueError with all that is wrong.
    """
    refused = {"lr": "it is set by learning_rate; remove it"}
    defaults = optimizer.own_rate if law == OWN_RATE else optimizer.defaults
    return {**(defaults or {}), **read_key_values(arguments, optimizer.arguments, refused)}


def _is_path_of(path: str, known: str) -> bool:
    package, _, name = known.rpartition(".")
    return path.startswith(f"{package}.") and path.rpartition(".")[2] == name
