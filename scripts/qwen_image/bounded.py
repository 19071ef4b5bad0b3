"""Texts that people write (TOML, JSON, YAML), read within bounds: no file makes a program hang, crash or fill memory.

A few bytes can stand for very much: nested brackets, YAML's anchors, numbers of a million digits, a device in a file's
place. Whatever is beyond what a setting can mean is refused with a reason. Imports no torch.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

MAX_BYTES = 2**20
"""Of a file of settings or prompts; the longest that people have are a hundredth of it."""
MAX_WRITTEN_BYTES = 2**27
"""Of a JSON file that a program wrote: a model's index, a tokenizer with its vocabulary (11 MB), a training's state."""
MAX_DEPTH = 50
"""Tables and lists inside each other. Far below where Python's own functions give up."""
MAX_VALUES = 1_000_000
"""Values in a file, each counted as often as an anchor repeats it."""
MAX_CHARACTERS = 2**24
"""Characters of all texts in a file, each counted as often as an anchor repeats it."""
MAX_NUMBER = 2**64
TOO_LONG = "a whole number of more than 64 bits"
MAX_DIGITS = 40
"""Characters of a number that stands as text; Python takes time by the square of their count to read a whole one."""
MAX_DOTS = 200
"""Dots in a line of TOML: the reader takes time and memory by the square of the parts of a dotted key."""
NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


def read_text(path: str | Path, max_bytes: int = MAX_BYTES) -> str:
    """Return a file's text, UTF-8 with or without a mark before it.

    Raises OSError, UnicodeDecodeError, or ValueError with a reason: no ordinary file, or more than `max_bytes`.
    """
    return read_bytes(path, max_bytes).decode("utf-8-sig")


def read_bytes(path: str | Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Return a file's content. Raises OSError, or ValueError with a reason: no ordinary file, or too large."""
    with open_file(path) as stream:
        # a file that grows meanwhile is not followed
        if os.fstat(stream.fileno()).st_size > max_bytes or len(content := stream.read(max_bytes + 1)) > max_bytes:
            raise ValueError(f"it is larger than {max_bytes / 2**20:g} MiB, which is the most for such a file")
    return content


def open_file(path: str | Path) -> BinaryIO:
    """Open a file for reading. Raises OSError, for a folder too, or ValueError for a pipe or a device."""
    # a pipe that nobody writes to must not hold the program up
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise ValueError("it is no ordinary file")


def parse_toml(text: str) -> dict[str, Any]:
    """Return what a TOML text says. Raises ValueError with a reason, the line in it where that can be told."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.count(".") > MAX_DOTS:
            raise ValueError(f"more than {MAX_DOTS} dots in one line (at line {number}, column 1)")
    return _parsed(tomllib.loads, text)


def parse_json(text: str, **options: Any) -> Any:
    """Return what a JSON text says; `options` are those of ``json.loads``. Raises ValueError with a reason."""
    return _parsed(lambda text: json.loads(text, **options), text)


def parse_yaml(text: str) -> Any:
    """Return what a YAML text says. Raises ValueError with a reason."""
    import yaml

    class Loader(yaml.SafeLoader):
        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            # merging lists of merged tables takes all memory while the text is still being read
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise ValueError("a merge key (<<) is not read here; write the keys out")

    try:
        return _parsed(lambda text: yaml.load(text, Loader), text)
    except Exception as error:  # its tags raise whatever Python makes of a value that does not suit them
        raise ValueError(str(error) or type(error).__name__) from error


def check_bounds(value: object, max_characters: int = MAX_CHARACTERS) -> None:
    """Raise ValueError for a value that is nested too deeply, too large once its anchors are followed, or too long."""
    waiting, count, characters = [(value, 0)], 0, 0
    while waiting:
        one, depth = waiting.pop()
        count += 1
        characters += len(one) if isinstance(one, str) else 0
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        if count > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values, counting each repetition of an anchor")
        if characters > max_characters:
            raise ValueError(f"texts of more than {max_characters:,} characters, counting each repetition of an anchor")
        if isinstance(one, int) and abs(one) >= MAX_NUMBER:
            raise ValueError(TOO_LONG)
        if isinstance(one, dict):
            waiting += [(inner, depth + 1) for pair in one.items() for inner in pair]
        elif isinstance(one, list | tuple):
            waiting += [(inner, depth + 1) for inner in one]


def text_fault(text: str) -> str | None:
    """Why a text cannot be written to a file or name one, or None when it can."""
    if "\0" in text:
        return "holds a NUL character"
    return "holds half of a surrogate pair" if re.search("[\ud800-\udfff]", text) else None


def is_number_text(text: str) -> bool:
    """Whether a text is a number of a length that a setting can have."""
    return len(text) <= MAX_DIGITS and NUMBER.fullmatch(text.strip()) is not None


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    try:
        value = parse(text)
    except RecursionError as error:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from error
    except ValueError as error:
        if "integer string conversion" in str(error):  # Python's own limit, in words for programmers
            raise ValueError(TOO_LONG) from error
        raise
    # without anchors nothing is longer than the text itself
    check_bounds(value, max(MAX_CHARACTERS, len(text)))
    return value
