"""How this project reports bad input: every problem at once, each with file, key, what was found and how to mend it."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwen_image.tokens import hide_tokens


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with what the user gave."""

    file: str
    """The file or folder it stands in."""
    key: str = ""
    """The key, line or item inside that file; empty when it is the file itself."""
    found: str
    """What was found, in the reader's words."""
    mend: str
    """What to do about it."""

    def __str__(self) -> str:
        """``file: key: found`` and the mend on a line of its own."""
        where = f"{self.file}: {self.key}" if self.key else self.file
        # messages end up in logs
        return hide_tokens(f"{where}: {self.found}\n    -> {self.mend}")


class InputError(ValueError):
    """Bad user input. Carries every problem found, so that one run of the program is enough to mend them all."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems, "an InputError needs at least one problem"
        self.problems = list(problems)
        count = len(self.problems)
        head = "1 problem was found:" if count == 1 else f"{count} problems were found:"
        super().__init__("\n".join([head, *(f"- {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple:
        """Rebuild from the problems, so that the error survives a trip between processes."""
        return type(self), (self.problems,)


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
