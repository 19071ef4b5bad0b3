"""A training whose job's time is up, or that is asked to stop: its job goes back into the queue, Snakemake waits for
it, and it ends with the bytes of a run that nothing happened to."""

import re
import time

import pytest
from cluster.damage import it_trains
from cluster.driving import STEPS, Project, Run, Scene, passed
from cluster.slurm import NODES, throwaway_cluster

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
        assert "this turn does a single step" in project.log("train/demo.log")
        # SLURM gives a job that was put back two minutes of rest
        limit = ["TimeLimit=300"] if restarts == 2 else []
        project.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", *limit)
    assert run.wait() == 0, run.report()
    assert project.jobs("train") == [job], run.report()
    log = project.log("train/demo.log")
    assert re.match(rf"job {job} on n[12], devices \d\n", log), log
    assert _went_on_after(project) >= 2
    assert "this turn does a single step" not in log
    assert project.hashes() == scene.finished().hashes(), run.report()


def not_put_back(scene: Scene):
    """Where SLURM does not take a job back, Snakemake submits another."""
    project = scene.copy().forget_training()
    run = project.start("--slurm-no-requeue")
    run.until(lambda: project.steps() >= 2)
    (job,) = project.jobs("train", "running")
    project.cluster.run("scancel", "--signal=USR1", job)
    assert run.wait() == 0, run.report()
    jobs = project.jobs("train")
    assert len(jobs) == 2, run.report()
    first, second = (project.cluster.facts(job)["MinMemoryNode"] for job in jobs)
    assert (first, second) == ("4000M", "8000M"), "the second attempt asks for more"
    assert "going on after step" in project.log("train/demo.log")
    assert project.hashes() == scene.finished().hashes(), run.report()


PREEMPTION = f"""\
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=DEFAULT GraceTime=60
PartitionName=urgent Nodes={",".join(NODES)} PriorityTier=2 MaxTime=INFINITE State=UP"""


def asked_to_stop(scene: Scene):
    """By its user, then by SLURM for a more important job, on a cluster that leaves no process of a step behind: each
    time the training saves its state, for which alone its job goes back into the queue."""
    with throwaway_cluster(tracking="pgid", more=PREEMPTION) as cluster:
        project = scene.copy(cluster).forget_training()
        run = project.start("--retries", "0")
        with it_trains(run, steps=2):
            (job,) = project.jobs("train", "running")
            cluster.run("scancel", "--signal=USR1", job)
            # time in which SLURM would end what it thinks has to end
            time.sleep(3)
        asked = _goes_on(project, run, restarts=1)
        with it_trains(run, steps=asked + 2):
            node = cluster.facts(job)["NodeList"]
            urgent = ["--partition=urgent", "--exclusive", f"--nodelist={node}", "--output=/dev/null", "--wrap=sleep 1"]
            assert cluster.run("sbatch", *urgent).returncode == 0
            run.until(lambda: cluster.facts(job)["JobState"] != "RUNNING")
        preempted = _goes_on(project, run, restarts=2, after=asked)
        assert run.wait() == 0, run.report()
        assert project.jobs("train") == [job], run.report()
        assert 2 <= asked < preempted < STEPS
        assert project.hashes() == scene.finished().hashes(), run.report()


def _goes_on(project: Project, run: Run, restarts: int, after: int = 0) -> int:
    """Wait until the training's job is in the queue once more and then goes on; return the step after which it does."""
    run.until(lambda: _waits_again(project, restarts), every=0.5)
    (job,) = project.jobs("train")
    # SLURM gives a job that was put back two minutes of rest
    project.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    run.until(lambda: _went_on_after(project) > after)
    return _went_on_after(project)


def _went_on_after(project: Project) -> int:
    """Return the step after which the training went on in its newest turn; 0 where it did not (yet)."""
    log = project.folder / "results/logs/train/demo.log"
    steps = re.findall(rf"going on after step (\d+) of {STEPS}", log.read_text()) if log.exists() else []
    return int(steps[0]) if steps else 0


def _waits_again(project, restarts):
    """Whether the training's job is in the queue once more."""
    jobs = project.jobs("train", "pending")
    facts = project.cluster.run("scontrol", "show", "job", jobs[0]).stdout if jobs else ""
    return f"Restarts={restarts} " in facts


@pytest.mark.parametrize("scenario", [time_is_up, not_put_back, asked_to_stop])
def test_requeued(played, scenario):
    passed(played[scenario.__name__])
