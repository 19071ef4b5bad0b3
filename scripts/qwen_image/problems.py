"""How this project reports bad input: every problem at once, each with file, key, what was found and how to mend it.

A message stays readable whatever the input was: long texts in it are shortened, and it ends where it gets too long.
"""

from __future__ import annotations

import difflib
import gc
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from qwen_image.tokens import hide_tokens

MAX_TEXT = 1000
"""Characters of one text in a message; the longest that this project writes itself has some 800."""
MAX_MESSAGE = 20_000
"""Characters of a message, enough for a hundred problems."""
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What steers a terminal, or turns the direction of writing."""


@dataclass(frozen=True)
class Nearest:
    """A mend that offers the one of several names that is nearest to the one found.

    Looking for it takes a while, so that is done when a message is written, and for what stands in it only.
    """

    name: str
    known: Collection[str] = field(hash=False)
    otherwise: str
    """The mend when none of them is near."""
    form: str = "did you mean {}?"

    def __str__(self) -> str:
        """Return the mend."""
        near = difflib.get_close_matches(self.name[:MAX_TEXT], self.known, n=1)
        return self.form.format(near[0]) if near else self.otherwise


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with what the user gave."""

    file: str
    """The file or folder it stands in."""
    key: str = ""
    """The key, line or item inside that file; empty when it is the file itself."""
    found: str
    """What was found, in the reader's words."""
    mend: str | Nearest
    """What to do about it."""

    def __str__(self) -> str:
        """``file: key: found`` and the mend on a line of its own: without tokens, and long texts shortened."""
        file, key, found, mend = (_shown(str(text)) for text in (self.file, self.key, self.found, self.mend))
        return f"{file}: {key}: {found}\n    -> {mend}" if key else f"{file}: {found}\n    -> {mend}"


class InputError(ValueError):
    """Bad user input. Carries every problem found, so that one run of the program is enough to mend them all.

    The message tells as many as can be read, and how many more there are.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems, "an InputError needs at least one problem"
        self.problems = list(problems)
        count = len(self.problems)
        head = "1 problem was found:" if count == 1 else f"{count} problems were found:"
        super().__init__("\n".join([head, *_lines(self.problems)]))

    def __reduce__(self) -> tuple:
        """Rebuild from the problems, so that the error survives a trip between processes."""
        return type(self), (self.problems,)


def _lines(problems: Sequence[Problem]) -> Iterator[str]:
    room = MAX_MESSAGE - 100  # for the first line and the last
    for number, problem in enumerate(problems):
        line = f"- {problem}"
        room -= len(line) + 1
        if room < 0:
            yield f"- and {len(problems) - number} more; mend the ones above first"
            return
        yield line


def _shown(text: str) -> str:
    """Return a text as it may stand in a message, which ends up in logs."""
    # half of a token would not be known for one
    text = STEERING.sub(lambda found: ascii(found[0])[1:-1], hide_tokens(text))
    more = len(text) - MAX_TEXT
    return text if more <= 0 else f"{text[: MAX_TEXT // 2]} (... {more} characters ...) {text[-MAX_TEXT // 2 :]}"


def run(main: Callable[[], int]) -> int:
    """Run a program's ``main`` and turn an `InputError` into its message on stderr and exit code 2.

    Told to stop (SIGTERM), the program leaves as it does on an error: what is under way is finished or undone.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # importing torch, diffusers and peft makes a million objects; looking for cycles after every 700 takes a second
    gc.set_threshold(20_000)
    try:
        return main()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
