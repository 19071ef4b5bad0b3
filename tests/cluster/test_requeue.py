"""A training whose job's time is up, or that is asked to stop: its job goes back into the queue, Snakemake waits for
it, and it ends with the bytes of a run that nothing happened to."""

import re

import pytest
from cluster.driving import STEPS, Scene, passed

# one worker has the cluster, however many run the other tests
pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]

HOUR = 60


def time_is_up(scene: Scene):
    """Twice the job ends right after it began to train; none of Snakemake's retries is used up for it."""
    project = scene.copy().forget_training()
    project.configure(stop_before=HOUR - 0.01)
    run = project.start("--set-resources", f"train:runtime={HOUR}", "--retries", "0")
    for restarts in (1, 2):
        run.until(lambda restarts=restarts: _waits_again(project, restarts), every=1)
        (job,) = project.jobs("train")
        assert not (project.folder / "results/logs/train/demo.failed").exists()
        # SLURM gives a job that was put back two minutes of rest
        limit = ["TimeLimit=300"] if restarts == 2 else []
        project.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", *limit)
    assert run.wait() == 0, run.report()
    assert project.jobs("train") == [job], run.report()
    log = project.log("train/demo.log")
    assert re.match(rf"job {job} on n[12], devices \d\n", log), log
    assert int(re.findall(rf"going on after step (\d+) of {STEPS}", log)[0]) >= 2
    assert project.hashes() == scene.finished().hashes(), run.report()


def not_put_back(scene: Scene):
    """Where SLURM does not take a job back, Snakemake submits another."""
    project = scene.copy().forget_training()
    run = project.start("--slurm-no-requeue")
    run.until(lambda: project.steps() >= 2)
    (job,) = project.jobs("train", "running")
    project.cluster.run("scancel", "--signal=USR1", job)
    assert run.wait() == 0, run.report()
    assert len(project.jobs("train")) == 2, run.report()
    assert "going on after step" in project.log("train/demo.log")
    assert project.hashes() == scene.finished().hashes(), run.report()


def _waits_again(project, restarts):
    """Whether the training's job is in the queue once more."""
    jobs = project.jobs("train", "pending")
    facts = project.cluster.run("scontrol", "show", "job", jobs[0]).stdout if jobs else ""
    return f"Restarts={restarts} " in facts


@pytest.mark.parametrize("scenario", [time_is_up, not_put_back])
def test_requeued(played, scenario):
    passed(played[scenario.__name__])
