"""SLURM jobs that a killed Snakemake left behind: the next one waits for them, so that nothing runs twice."""

from __future__ import annotations

import getpass
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

SECONDS_BETWEEN_LOOKS = 10


def wait_for_earlier_jobs(folder: str, say: Callable[[str], None]) -> None:
    """Wait until the jobs that are in the queue now, and that a Snakemake submitted from `folder`, have ended.

    Called before this run submits a job. What they finish is found finished by the jobs that come after them.
    """
    if shutil.which("squeue") is None:
        return
    waiting = set(_queued(folder, say))
    if waiting:
        numbers = " ".join(sorted(waiting))
        say(f"Jobs of an earlier run are still in the queue: {numbers}. Waiting for them, to do no work twice.")
        say(f"To give up what they have not saved: scancel {numbers}")
    while waiting := waiting.intersection(_queued(folder, say)):
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _queued(folder: str, say: Callable[[str], None]) -> list[str]:
    """Return the numbers of the user's jobs in the queue that Snakemake's SLURM plugin submitted from `folder`."""
    command = ["squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%A|%k|%Z"]
    while (answer := subprocess.run(command, capture_output=True, text=True)).returncode:
        say(f"{' '.join(command)} failed; asking again in {SECONDS_BETWEEN_LOOKS} s. {answer.stderr.strip()}")
        time.sleep(SECONDS_BETWEEN_LOOKS)
    jobs = [line.split("|", 2) for line in answer.stdout.splitlines()]
    # the plugin names the rule in the job's comment
    return [number for number, comment, path in jobs if comment.startswith("rule_") and Path(path) == Path(folder)]
