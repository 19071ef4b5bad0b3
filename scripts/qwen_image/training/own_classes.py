"""Classes that a user names by their dotted path: imported, and their arguments checked against their signatures."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Sequence

from qwen_image.problems import InputError, Problem
from qwen_image.training.key_values import literal


def load_class(path: str, base: type, key: str) -> type:
    """Return the class at ``package.module.Class``. Raises InputError when it is missing or no subclass of `base`."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        mend = "install its package, and write the path as package.module.Class"
        raise InputError([Problem(file="settings", key=key, found=f"{path}: {error}", mend=mend)]) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        mend = f"name a subclass of {base.__module__}.{base.__qualname__}"
        raise InputError([Problem(file="settings", key=key, found=f"{path} is none", mend=mend)])
    return found


def options_for(kind: type, arguments: Sequence[str] | None, key: str, *, own: Sequence[str]) -> dict[str, object]:
    """Return ``["name=literal"]`` as keyword arguments that a class takes; `own` are those that are not the user's.

    Raises InputError with every argument that it does not take.
    """
    taken = [name for name in inspect.signature(kind).parameters if name not in own]
    options: dict[str, object] = {}
    problems = []
    for argument in arguments or ():
        name, equals, text = (part.strip() for part in argument.partition("="))
        if not equals or name not in taken or name in options:
            near = difflib.get_close_matches(name, taken, n=1)
            mend = f"did you mean {near[0]}?" if near else f"{kind.__qualname__} takes {', '.join(taken)}, each once"
            problems.append(Problem(file="settings", key=key, found=f"{argument!r} is no argument of it", mend=mend))
        options[name] = literal(text)
    if problems:
        raise InputError(problems)
    return options
