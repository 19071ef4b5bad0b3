"""The SLURM job that this process runs in: what is known of it, and how it is put back into the queue.

Where SLURM does not answer nothing fails: what is not known is None, and what cannot be done is False.
"""

from __future__ import annotations

import os
import re
import subprocess

JOB_ID = "SLURM_JOB_ID"
JOB_END = "SLURM_JOB_END_TIME"
"""Environment variable with the second (since 1970) at which SLURM ends the job; only newer versions set it."""
TIMEOUT_SECONDS = 60


def job_end() -> int | None:
    """Return the second (since 1970) at which SLURM ends the job."""
    told = os.environ.get(JOB_END)
    if told is None and (job := os.environ.get(JOB_ID)):
        told = _ask("squeue", "--noheader", f"--jobs={job}", "--format=%e", SLURM_TIME_FORMAT="%s").strip()
    return int(told) if told and told.isdecimal() else None


def describe_job() -> str:
    """Return ``job 17 on n1``, with the task's number where there are several; empty outside of a job."""
    job = os.environ.get(JOB_ID)
    if job is None:
        return ""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    text = f"job {array}_{index}" if array and index else f"job {job}"
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        text += f" task {os.environ['SLURM_PROCID']}"
    node = os.environ.get("SLURMD_NODENAME")
    return f"{text} on {node}" if node else text


def requeue_job() -> bool:
    """Put the job back into the queue, where Snakemake goes on waiting for it; return whether it is there now.

    SLURM then ends the job's processes. Only a job that Snakemake's SLURM plugin submitted is put back, and none that
    was cancelled: SLURM itself would take that back as well.
    """
    job = os.environ.get(JOB_ID)
    if job is None:
        return False
    facts = _ask("scontrol", "--oneliner", "show", "job", job)
    # the plugin names the rule in the job's comment
    if not re.search(r"(^|\s)Comment=(rule|group)_", facts) or not _is_wanted(facts):
        return False
    return _succeeds("scontrol", "requeue", job)


def _is_wanted(facts: str) -> bool:
    """Whether the job runs, or is about to end for a more important one.

    One past its time limit counts as failed from then on: Snakemake may be about to submit it anew.
    """
    preempted = re.search(r"(^|\s)PreemptTime=\d", facts)
    return bool(re.search(r"(^|\s)JobState=RUNNING\s", facts)) or (
        bool(preempted) and bool(re.search(r"(^|\s)JobState=(COMPLETING|PREEMPTED)\s", facts))
    )


def _ask(*command: str, **environment: str) -> str:
    """Return what a command prints; empty where it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=os.environ | environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=TIMEOUT_SECONDS).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
