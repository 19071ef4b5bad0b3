"""Optimizers of well-kept libraries, by name or by their class's path, and the few ways in which they differ in use."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from qwen_image.problems import InputError, Problem
from qwen_image.training.optimizer_options import named_optimizer, optimizer_arguments
from qwen_image.training.own_classes import load_class, options_for

if TYPE_CHECKING:
    from qwen_image.training.arguments import Settings


def make_optimizer(settings: Settings, groups: Sequence[dict[str, object]]) -> torch.optim.Optimizer:
    """Return the optimizer over parameter groups, each with its ``lr_ratio`` to the learning rate.

    Raises InputError for a class of the user's own that cannot be had or does not take its arguments.
    """
    kind, options = _kind_and_options(settings)
    # a rate that the optimizer finds by itself may not be given
    rate = None if options.get("relative_step") else settings.learning_rate
    try:
        optimizer = kind([dict(group) for group in groups], lr=rate, **options)
    except (TypeError, ValueError) as error:
        mend = "give optimizer_args what this optimizer takes"
        raise InputError([Problem(file="settings", key="optimizer_args", found=str(error), mend=mend)]) from error
    for group in optimizer.param_groups:
        group.setdefault("lr_ratio", 1.0)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next step, in each group times its ratio; one that sets its own is left alone."""
    for group in optimizer.param_groups:
        if group["lr"] is not None:
            group["lr"] = rate * group["lr_ratio"]


@contextlib.contextmanager
def evaluation_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Have the parameters hold the average that a schedule-free optimizer keeps; others change nothing."""
    own = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if not hasattr(own, "eval"):
        yield
        return
    parameters = [parameter for group in own.param_groups for parameter in group["params"]]
    before = [parameter.detach().clone() for parameter in parameters]
    own.eval()
    try:
        yield
    finally:
        own.train()
        # there and back does not give the same bits; a look at the weights must not change the training
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def optimizer_label(settings: Settings) -> str:
    """Return ``module.Class(argument=value,...)``, as the field's metadata names an optimizer."""
    kind, options = _kind_and_options(settings)
    pairs = ",".join(f"{key}={value}" for key, value in options.items())
    return f"{kind.__module__}.{kind.__qualname__}" + (f"({pairs})" if pairs else "")


def _kind_and_options(settings: Settings) -> tuple[type, dict[str, object]]:
    named = named_optimizer(settings.optimizer_type)
    path = settings.optimizer_type if named is None else named.path
    kind = load_class(path, torch.optim.Optimizer, "optimizer_type")
    if named is not None:
        return kind, optimizer_arguments(named, settings.optimizer_args)
    if "lr" not in inspect.signature(kind).parameters:
        mend = "name one that takes lr, the learning rate"
        raise InputError([Problem(file="settings", key="optimizer_type", found=f"{path} takes no lr", mend=mend)])
    return kind, options_for(kind, settings.optimizer_args, "optimizer_args", own=("params", "lr"))
