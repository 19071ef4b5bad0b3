"""SLURM jobs that SLURM has forgotten: Snakemake would wait for them forever.

A controller saves what it knows every few seconds. When it is killed right after a job was submitted, it comes back
without it; and jobs that ended disappear from squeue, which is all there is to ask on a cluster without accounting.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

ANSWERS = 3
"""In how many answers in a row a job must be missing: sacct names a new one late."""


def notice_forgotten_jobs(executor: Any, plugin: Any) -> None:
    """Make Snakemake's SLURM executor count a job as failed that no answer names any more and that squeue denies.

    It is submitted again then (``retries``), and finds what the forgotten one has finished. Should that one still run
    on its node, a training waits for it (training/ownership.py).

    Source: snakemake-executor-plugin-slurm 2.8.0, whose ``check_active_jobs`` keeps such a job for good.
    """
    ask, check = plugin.query_job_status, executor.check_active_jobs
    answers: list[dict[str, str]] = []
    missing: Counter[str] = Counter()

    async def query_job_status(command: str, logger: Any) -> tuple[dict[str, str] | None, float | None]:
        states, seconds = await ask(command, logger)
        if states is not None:
            answers.append(states)
        return states, seconds

    async def check_active_jobs(active: list[Any]) -> AsyncIterator[Any]:
        answers.clear()
        async for job in check(active):
            number = job.external_jobid
            # a task of an array is named by its own number or by the array's
            if answers:
                named = {number, number.split("_")[0]} & answers[-1].keys()
                missing[number] = 0 if named else missing[number] + 1
            if missing[number] >= ANSWERS and _denied(number):
                del missing[number]
                executor.report_job_error(job, msg=_message(number))
            else:
                yield job

    plugin.query_job_status, executor.check_active_jobs = query_job_status, check_active_jobs


def _denied(number: str) -> bool:
    """Whether SLURM's controller answers, and does not know the job."""
    command = ["squeue", "--noheader", "--states=all", f"--jobs={number}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    if answer.returncode:
        return "invalid job id" in answer.stderr.lower()
    return not answer.stdout.strip()


def _message(number: str) -> str:
    return (
        f"SLURM does not know job {number} any more, and how it ended cannot be told: its controller may have been "
        "killed before it saved the job, or has removed it from its memory. What it finished is not done again. "
    )
