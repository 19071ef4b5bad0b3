"""Optimizers of well-kept libraries, by name or by their class's path, and the few ways in which they differ in use."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qwen_image.problems import InputError, Problem
from qwen_image.training.optimizer_options import named_optimizer, optimizer_arguments
from qwen_image.training.own_classes import load_class, options_for, parameter_names
from qwen_image.training.tree import read_tree, write_tree

if TYPE_CHECKING:
    from qwen_image.training.arguments import Settings


def check_optimizer(settings: Settings, device: torch.device) -> None:
    """Have the optimizer train two small matrices, and go on from its state, before anything large is loaded.

    Raises InputError when it cannot be had, does not take its arguments, asks for more than gradients, needs another
    device, or does not go on to the bit: a training that was stopped would then end otherwise than one that was not.
    """
    try:
        straight, resumed = (_rehearsed(settings, device, stop=stop) for stop in (False, True))
    except InputError:
        raise
    # an optimizer is anybody's code, and may fail in any way
    except Exception as error:
        found = f"{settings.optimizer_type} cannot train here: {error}"
        mend = "choose another one; AdamW works everywhere"
        raise InputError([Problem(file="settings", key="optimizer_type", found=found, mend=mend)]) from error
    if not all(map(torch.equal, straight, resumed)):
        found = f"{settings.optimizer_type} does not go on from its saved state as if it had never stopped"
        mend = "choose another one; those that can be asked for by name all do"
        raise InputError([Problem(file="settings", key="optimizer_type", found=found, mend=mend)])


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
        key = "optimizer_args" if settings.optimizer_args else "optimizer_type"
        mend = "give optimizer_args what this optimizer takes, or choose another one"
        raise InputError([Problem(file="settings", key=key, found=str(error), mend=mend)]) from error
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
        return kind, optimizer_arguments(named, settings.optimizer_args, settings.lr_scheduler)
    if "lr" not in parameter_names(kind):
        mend = "name one that takes lr, the learning rate"
        raise InputError([Problem(file="settings", key="optimizer_type", found=f"{path} takes no lr", mend=mend)])
    return kind, options_for(kind, settings.optimizer_args, "optimizer_args", own=("params", "lr", "defaults"))


def _rehearsed(settings: Settings, device: torch.device, *, stop: bool) -> list[torch.Tensor]:
    """Return two matrices after four steps of training, which may be stopped and gone on with half way."""
    parameters, optimizer = _small_training(settings, device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step in range(4):
            if stop and step == 2:
                before, state = parameters, _through_a_file(optimizer.state_dict())
                parameters, optimizer = _small_training(settings, device)
                with torch.no_grad():
                    for new, old in zip(parameters, before, strict=True):
                        new.copy_(old)
                optimizer.load_state_dict(state)
            # as each step of a training has its own seed
            torch.manual_seed(step)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape).to(device)
            set_learning_rate(optimizer, settings.learning_rate / (step + 1))
            optimizer.step()
    return [parameter.detach() for parameter in parameters]


def _small_training(settings: Settings, device: torch.device) -> tuple[list, torch.optim.Optimizer]:
    # large enough to be kept in 8 bits by those that leave small ones alone
    start = torch.linspace(-1, 1, 64 * 80, device=device).reshape(64, 80)
    parameters = [torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.T.contiguous())]
    groups = [{"params": [parameter], "lr_ratio": 1.0} for parameter in parameters]
    return parameters, make_optimizer(settings, groups)


def _through_a_file(state: dict[str, object]) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimizer.safetensors"
        write_tree(path, state)
        return read_tree(path)
