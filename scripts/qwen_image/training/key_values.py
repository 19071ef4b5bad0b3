"""The arguments that hold settings of their own: ``optimizer_args`` and ``network_args``, lists of ``key=literal``.

No torch here: the check of a config reads them too.
"""

from __future__ import annotations

import ast
import difflib
import math
from collections.abc import Callable, Mapping, Sequence

ADAMW_NAMES = ("adamw", "torch.optim.adamw", "torch.optim.adamw.adamw")
OTHER_OPTIMIZERS = ("adamw8bit", "pagedadamw8bit", "adafactor", "prodigy", "lion", "came", "adamwschedulefree", "sgd")


class KeyValueError(ValueError):
    """What is wrong with such a list: pairs of what was found and how to mend it."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(found for found, _ in problems))
        self.problems = problems


def optimizer_name(name: str) -> str:
    """Return ``torch.optim.AdamW`` for any spelling of it. Raises KeyValueError for others."""
    if name.lower() in ADAMW_NAMES:
        return "torch.optim.AdamW"
    found = f"{name!r} is not in this version" if name.lower() in OTHER_OPTIMIZERS else f"{name!r} is no optimizer"
    raise KeyValueError([(found, "use AdamW")])


def optimizer_arguments(arguments: Sequence[str] | None) -> dict[str, object]:
    """Return AdamW's settings from a list such as ``["weight_decay=0.1", "betas=(0.9,0.99)"]``."""
    return read_key_values(arguments, _ADAMW, {"lr": "it is set by learning_rate; remove it"})


def read_key_values(
    arguments: Sequence[str] | None, checks: Mapping[str, tuple[Callable, str]], refused: Mapping[str, str]
) -> dict[str, object]:
    """Return key and value of a list such as ``["key=1"]``. Raises KeyValueError with all that is wrong with it.

    `checks` holds for each key whether a value is accepted, and in words what is; `refused` why a key is not.
    """
    values: dict[str, object] = {}
    problems: list[tuple[str, str]] = []
    for argument in arguments or ():
        # only the first = separates: patterns may hold more of them
        name, equals, text = (part.strip() for part in argument.partition("="))
        near = difflib.get_close_matches(name, checks, n=1)
        if not equals:
            problems.append((f"{argument!r} is no key=value", f"write one of {', '.join(checks)} with its value"))
        elif name in refused:
            problems.append((f"{name} is not supported here", refused[name]))
        elif name not in checks:
            mend = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(checks)}"
            problems.append((f"{name!r} is no known key", mend))
        elif name in values:
            problems.append((f"{name} is given twice", "keep one of them"))
        else:
            accepts, expected = checks[name]
            value = _literal(text)
            values[name] = value
            if not accepts(value):
                problems.append((f"{name}={text}", f"give {expected}"))
    if problems:
        raise KeyValueError(problems)
    return values


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def is_number(value: object) -> bool:
    """Whether it is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_betas(value: object) -> bool:
    return (
        isinstance(value, list | tuple) and len(value) == 2 and all(is_number(beta) and 0 <= beta < 1 for beta in value)
    )


_ADAMW = {
    "weight_decay": (lambda value: is_number(value) and value >= 0, "a number of 0 or more"),
    "betas": (_is_betas, "two numbers below 1, such as (0.9,0.999)"),
    "eps": (lambda value: is_number(value) and value > 0, "a number above 0"),
    "amsgrad": (lambda value: isinstance(value, bool), "True or False"),
}
