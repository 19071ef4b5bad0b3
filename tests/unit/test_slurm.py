"""What is known of a stage's SLURM job, and when it is put back into the queue. tests/cluster asks a real SLURM."""

import os

import pytest

from qwen_image.slurm import describe_job, job_end, requeue_job
from qwen_image.training.interruption import job_deadline

COMMENT = "Comment=rule_train_wildcards_demo"


@pytest.fixture(autouse=True)
def job(monkeypatch, tmp_path):
    """A job of SLURM's without any command of SLURM's, whatever this machine has."""
    for name in os.environ:
        if name.startswith("SLURM"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    for name in ("scontrol", "squeue"):
        command(tmp_path, name, "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def command(folder, name, script):
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_the_jobs_end_is_told_by_the_environment_or_asked_for(monkeypatch, tmp_path):
    assert job_end() is None
    command(tmp_path, "squeue", 'echo "$*" > "$0.asked"; [ "$SLURM_TIME_FORMAT" = %s ] && echo 1795597967')
    assert job_end() == 1795597967
    assert "--jobs=17" in (tmp_path / "squeue.asked").read_text()
    assert job_deadline(5) == 1795597967 - 300
    command(tmp_path, "squeue", "echo NONE")
    assert job_end() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1795597000")
    assert job_end() == 1795597000


def test_outside_of_a_job_nothing_is_asked(monkeypatch, tmp_path):
    monkeypatch.delenv("SLURM_JOB_ID")
    command(tmp_path, "squeue", "echo 1795597967")
    command(tmp_path, "scontrol", f"echo JobState=RUNNING {COMMENT}")
    assert (describe_job(), job_end(), requeue_job()) == ("", None, False)


def test_a_job_is_described_as_far_as_it_is_known(monkeypatch):
    assert describe_job() == "job 17"
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert describe_job() == "job 17 on n1"
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "15")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert describe_job() == "job 15_3 task 1 on n1"


@pytest.mark.parametrize(
    ("facts", "goes_back"),
    [
        (f"JobState=RUNNING Reason=None PreemptTime=None {COMMENT}", True),
        (f"JobState=COMPLETING Reason=None PreemptTime=2026-11-25T09:15:12 {COMMENT}", True),
        # cancelled
        (f"JobState=COMPLETING Reason=None PreemptTime=None {COMMENT}", False),
        # Snakemake may take it for failed already
        (f"JobState=COMPLETING Reason=TimeLimit PreemptTime=None {COMMENT}", False),
        # somebody's own script
        ("JobState=RUNNING Reason=None Comment=my_rule_of_thumb", False),
        ("JobState=RUNNING Reason=None AdminComment=rule_train", False),
    ],
)
def test_a_job_of_snakemakes_that_was_not_cancelled_goes_back_into_the_queue(tmp_path, facts, goes_back):
    command(tmp_path, "scontrol", f'echo "$*" >> "$0.asked"; echo "JobId=17 JobName=x {facts} Power="')
    assert requeue_job() is goes_back
    asked = (tmp_path / "scontrol.asked").read_text().splitlines()
    assert ("requeue 17" in asked) is goes_back


def test_where_a_site_forbids_it_the_job_is_not_put_back(tmp_path):
    command(tmp_path, "scontrol", f'[ "$1" = requeue ] && exit 1; echo "JobState=RUNNING {COMMENT} Power="')
    assert requeue_job() is False
