"""When a training should end early: a signal that asks it to, or the end of its job that draws near.

The loop asks once a step, saves its state and leaves with `GOES_ON_LATER`; the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator

from qwen_image.slurm import job_end

GOES_ON_LATER = 75
"""Exit code of a training that saved its state to go on later: EX_TEMPFAIL of sysexits.h."""
GOES_ON = "the same command goes on from there"
"""What such a training says last; launchers between it and its stage keep no exit code."""
STATE_IS_SAVED = f"its state is saved; {GOES_ON}"
"""What it says when it has come further; only then is it worth a job of its own that it is run again."""
WENT_ON = "going on after step"
"""What it says, before the step's number, when it does."""
ALREADY_FINISHED = "is finished; nothing to do"
"""What a training says that finds its result there."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LONGEST_MARGIN_SECONDS = 300
SHARE_OF_JOB = 0.2
"""Where nobody says how long before its end a training should stop, a short job is not to be spent on stopping."""


class Interruption:
    """Remembers a signal, and knows the deadline."""

    def __init__(self, deadline: float | None = None, *, clock: Callable[[], float] = time.time) -> None:
        """`deadline` is in seconds since 1970; None where there is none."""
        self._deadline = deadline
        self._clock = clock
        self._signal: signal.Signals | None = None

    def reason(self) -> str | None:
        """Why the training should stop now, or None."""
        if self._signal is not None:
            return f"{self._signal.name} was received"
        if self._deadline is not None and self._clock() >= self._deadline:
            return "the end of the job is near"
        return None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while the training runs. A second Ctrl-C ends it at once, as it always does."""
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._signal = signal.Signals(number)


def job_deadline(minutes_before: float | None) -> float | None:
    """Return the second (since 1970) to stop at, so many minutes before the SLURM job's end; None without a known end.

    With None, it is a fifth of the time that the job has left before its end, at most five minutes.
    """
    end = job_end()
    if end is None:
        return None
    if minutes_before is not None:
        return end - 60 * minutes_before
    return end - min(LONGEST_MARGIN_SECONDS, SHARE_OF_JOB * max(0.0, end - time.time()))
