"""The arguments that hold settings of their own: ``optimizer_args`` and ``network_args``, lists of ``key=literal``.

No torch here: the check of a config reads them too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Mapping, Sequence

from qwen_image.problems import Nearest


class KeyValueError(ValueError):
    """What is wrong with such a list: pairs of what was found and how to mend it."""

    def __init__(self, problems: list[tuple[str, str | Nearest]]) -> None:
        super().__init__("; ".join(found for found, _ in problems))
        self.problems = problems


def read_key_values(
    arguments: Sequence[str] | None, checks: Mapping[str, tuple[Callable, str]], refused: Mapping[str, str]
) -> dict[str, object]:
    """Return key and value of a list such as ``["key=1"]``. Raises KeyValueError with all that is wrong with it.

    `checks` holds for each key whether a value is accepted, and in words what is; `refused` why a key is not.
    """
    values: dict[str, object] = {}
    problems: list[tuple[str, str | Nearest]] = []
    for argument in arguments or ():
        # only the first = separates: patterns may hold more of them
        name, equals, text = (part.strip() for part in argument.partition("="))
        if not equals:
            problems.append((f"{argument!r} is no key=value", f"write one of {', '.join(checks)} with its value"))
        elif name in refused:
            problems.append((f"{name} is not supported here", refused[name]))
        elif name not in checks:
            mend = Nearest(name, list(checks), f"the keys are {', '.join(checks)}")
            problems.append((f"{name!r} is no known key", mend))
        elif name in values:
            problems.append((f"{name} is given twice", "keep one of them"))
        else:
            accepts, expected = checks[name]
            value = literal(text)
            values[name] = value
            if not accepts(value):
                problems.append((f"{name}={text}", f"give {expected}"))
    if problems:
        raise KeyValueError(problems)
    return values


def literal(text: str) -> object:
    """Return what a text says in Python's notation; a text that says nothing in it is a text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def is_number(value: object) -> bool:
    """Whether it is a finite number; true and false are none."""
    # a whole number that no float can hold is as good as infinite
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
