"""Jobs that SLURM does not know any more or will not start again: counted as failed, once that is sure."""

import asyncio
from types import SimpleNamespace

import pytest

from qwen_image.lost_jobs import ANSWERS, notice_lost_jobs


class Executor:
    """Snakemake's executor with the SLURM plugin as far as it matters here: what is not named is active for good."""

    def __init__(self):
        self.answer = {}
        self.failed = []
        self.plugin = SimpleNamespace(query_job_status=self.ask)

    async def ask(self, command, logger):
        return (None, None) if self.answer is None else (self.answer, 0.1)

    async def check_active_jobs(self, active):
        await self.plugin.query_job_status("squeue", None)
        for job in active:
            if (self.answer or {}).get(job.external_jobid) != "COMPLETED":
                yield job

    def report_job_error(self, job, msg):
        self.failed.append((job.external_jobid, msg))


@pytest.fixture
def executor(tmp_path, monkeypatch):
    """The executor, with a squeue on the PATH that knows no job."""
    executor = Executor()
    executor.squeue = tmp_path / "squeue"
    executor.squeue.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n")
    executor.squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    notice_lost_jobs(executor, executor.plugin)
    return executor


def look(executor, *answers, jobs=("7",)):
    """Let Snakemake look at its jobs once for each answer; return those that it goes on waiting for."""
    active = [SimpleNamespace(external_jobid=number) for number in jobs]

    async def check():
        return [job async for job in executor.check_active_jobs(active)]

    for executor.answer in answers:
        active = asyncio.run(check())
    return [job.external_jobid for job in active]


def test_a_forgotten_job_has_failed(executor):
    assert look(executor, {"8": "RUNNING"}, {}, jobs=("7", "8")) == ["7", "8"]
    assert look(executor, {"8": "RUNNING"}, jobs=("7", "8")) == ["8"]
    ((number, message),) = executor.failed
    assert number == "7"
    assert "does not know job 7 any more" in message


def test_answers_that_name_it_or_do_not_come_count_for_nothing(executor):
    here, away, none = {"7": "RUNNING"}, {}, None
    assert look(executor, *[away] * (ANSWERS - 1), here, *[none] * ANSWERS, *[away] * (ANSWERS - 1)) == ["7"]
    assert executor.failed == []
    assert look(executor, {"7": "COMPLETED"}) == []


def test_a_task_is_named_by_its_array(executor):
    assert look(executor, *[{"7": "RUNNING"}] * 2 * ANSWERS, jobs=("7_3",)) == ["7_3"]


def test_a_job_that_is_preempted_for_good_has_failed(executor):
    executor.squeue.write_text("#!/bin/sh\necho PREEMPTED\n")
    assert look(executor, *[{"7": "PREEMPTED"}] * (ANSWERS - 1)) == ["7"]
    assert look(executor, {"7": "PREEMPTED"}) == []
    assert "preempted job 7" in executor.failed[0][1]


def test_a_preempted_job_that_is_put_back_is_waited_for(executor):
    executor.squeue.write_text("#!/bin/sh\necho PENDING\n")
    assert look(executor, *[{"7": "PREEMPTED"}] * 2 * ANSWERS) == ["7"]


@pytest.mark.parametrize("script", ["echo PENDING", "echo 'Unable to contact slurm controller' >&2; exit 1"])
def test_squeue_has_the_last_word(executor, script):
    executor.squeue.write_text(f"#!/bin/sh\n{script}\n")
    assert look(executor, *[{}] * 2 * ANSWERS) == ["7"]
    assert executor.failed == []


def test_without_squeue_nothing_is_known(executor):
    executor.squeue.unlink()
    executor.squeue.symlink_to("/nowhere")
    assert look(executor, *[{}] * 2 * ANSWERS) == ["7"]


def test_a_job_that_squeue_has_forgotten_without_an_error(executor):
    executor.squeue.write_text("#!/bin/sh\nexit 0\n")
    assert look(executor, *[{}] * ANSWERS) == []
