"""Classes that a user names by their dotted path: imported, and their arguments checked against their signatures."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence

from qwen_image.problems import InputError, Nearest, Problem
from qwen_image.training.key_values import literal


def load_class(path: str, base: type, key: str, *, makers: Sequence[str] = ()) -> Callable:
    """Return the subclass of `base` at ``package.module.Class``, or a function that a module among `makers` defines.

    Nothing is called here, and nothing else is returned to be called with what a user gives: any other function of any
    package would be a way to run commands. A name without a package is one beside `base`. Raises InputError when there
    is nothing of this name, or something else.
    """
    module, _, name = path.rpartition(".")
    package = path.partition(".")[0]
    if sys.modules.get(package, package) is None:
        del sys.modules[package]  # hidden from other libraries; see the package's __init__.py
    try:
        found = getattr(importlib.import_module(module or base.__module__), name)
    # what is imported is anybody's code, and may fail in any way
    except Exception as error:
        mend = "install its package, and write the path as package.module.Class"
        raise InputError([Problem(file="settings", key=key, found=f"{path}: {error}", mend=mend)]) from error
    made = inspect.isfunction(found) and found.__module__ in makers
    if not (made or (isinstance(found, type) and issubclass(found, base))):
        what = "a class of another kind" if isinstance(found, type) else f"a {type(found).__name__}"
        mend = f"name a subclass of {base.__module__}.{base.__qualname__}"
        mend += f", or a function of {' or '.join(makers)}" if makers else ""
        raise InputError([Problem(file="settings", key=key, found=f"{path} is {what}", mend=mend)])
    return found


def options_for(kind: Callable, arguments: Sequence[str] | None, key: str, *, own: Sequence[str]) -> dict[str, object]:
    """Return ``["name=literal"]`` as keyword arguments that a class takes; `own` are those that are not the user's.

    Raises InputError with every argument that it does not take.
    """
    taken = [name for name in parameter_names(kind) if name not in own]
    options: dict[str, object] = {}
    problems = []
    for argument in arguments or ():
        name, equals, text = (part.strip() for part in argument.partition("="))
        if not equals or name not in taken or name in options:
            mend = Nearest(name, taken, f"{kind.__qualname__} takes {', '.join(taken)}, each once")
            problems.append(Problem(file="settings", key=key, found=f"{argument!r} is no argument of it", mend=mend))
        options[name] = literal(text)
    if problems:
        raise InputError(problems)
    return options


def parameter_names(kind: Callable) -> list[str]:
    """Return the names of what a class or function takes.

    What a class hands on unseen (``**kwargs``) is looked up in the classes it is made from: nothing else tells a
    misspelt name from a good one.
    """
    names: dict[str, None] = {}
    for one in inspect.getmro(kind) if isinstance(kind, type) else [kind]:
        parameters = inspect.signature(one.__init__ if isinstance(one, type) else one).parameters.values()
        names |= {each.name: None for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            break
    names.pop("self", None)
    return list(names)
