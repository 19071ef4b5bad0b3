"""SLURM jobs that have ended without Snakemake's being told: it would wait for them forever.

A controller saves what it knows every few seconds. When it is killed right after a job was submitted, it comes back
without it; and jobs that ended disappear from squeue, which is all there is to ask on a cluster without accounting. A
job that was preempted for good (PreemptMode=CANCEL) is told, but taken for one that SLURM will start again.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

ANSWERS = 3
"""In how many answers in a row a job must look lost: sacct names a new one late."""
PREEMPTED = "PREEMPTED"


def notice_lost_jobs(executor: Any, plugin: Any) -> None:
    """Make Snakemake's SLURM executor count a job as failed that no answer names any more, or only as preempted.

    squeue has the last word. The job is submitted again then (``retries``), and finds what the lost one has finished.
    Should that one still run on its node, a training waits for it (training/ownership.py).

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
                state = answers[-1].get(number) or answers[-1].get(number.split("_")[0])
                missing[number] = missing[number] + 1 if state in (None, PREEMPTED) else 0
            if missing[number] >= ANSWERS and (how := _how_lost(number)):
                del missing[number]
                executor.report_job_error(job, msg=f"{how} What it finished is not done again. ")
            else:
                yield job

    plugin.query_job_status, executor.check_active_jobs = query_job_status, check_active_jobs


def _how_lost(number: str) -> str | None:
    """Say what became of the job, where SLURM's controller answers and it will not run (again)."""
    command = ["squeue", "--noheader", "--states=all", f"--jobs={number}", "--format=%T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    states = set(answer.stdout.split())
    if states == {PREEMPTED}:
        return f"SLURM preempted job {number}, and does not start it again."
    if "invalid job id" in answer.stderr.lower() if answer.returncode else not states:
        return (
            f"SLURM does not know job {number} any more, and how it ended cannot be told: its controller may have "
            "been killed before it saved the job, or has removed it from its memory."
        )
    return None
