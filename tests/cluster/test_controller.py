"""Snakemake as a SLURM job: it goes back into the queue when its time is up, and ends with its jobs when asked."""

import shutil
import textwrap
import time
from collections.abc import Callable

import pytest
from cluster.driving import PATIENCE, ROOT, Project, Scene, passed

# one worker has the cluster, however many run the other tests
pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]

SNAKEFILE = """
    import os, sys

    sys.path.insert(0, {scripts!r})
    include: {rules!r}

    localrules: both

    rule both:
        input: "first.txt", "second.txt"

    rule first:
        output: "first.txt"
        shell: "while [ ! -e go ]; do sleep 0.2; done; echo $SLURM_JOB_ID >> runs; cp runs {{output}}"

    rule second:
        input: "first.txt"
        output: "second.txt"
        shell: "touch {{output}}"
"""


def goes_back_into_the_queue(scene: Scene):
    """When its time is up it lets its jobs run, and waits for them in its next turn."""
    project = _project(scene)
    controller = submit(project)
    wait(project, lambda: project.jobs("first", "running"))
    project.cluster.run("scancel", "--batch", "--signal=USR1", controller)
    wait(project, lambda: state(project, controller) == "PENDING")
    assert project.jobs("first", "running"), report(project)
    # SLURM gives a job that was put back two minutes of rest
    project.cluster.run("scontrol", "update", f"JobId={controller}", "StartTime=now")
    wait(project, lambda: "Jobs of an earlier run are still in the queue" in report(project))
    (project.folder / "go").touch()
    wait(project, lambda: state(project, controller) not in ("PENDING", "RUNNING", "COMPLETING"))
    assert state(project, controller) == "COMPLETED", report(project)
    assert (project.folder / "second.txt").exists(), report(project)


def ends_with_its_jobs(scene: Scene):
    """Asked to end as docs/cluster.md says, it takes its jobs with it."""
    project = _project(scene)
    controller = submit(project)
    wait(project, lambda: project.jobs("first", "running"))
    project.cluster.run("scancel", "--batch", "--signal=INT", controller)
    wait(project, lambda: state(project, controller) not in ("RUNNING", "COMPLETING"))
    assert state(project, controller) == "FAILED", report(project)
    wait(project, lambda: not project.jobs("first", "running"))
    assert not (project.folder / "first.txt").exists()


def _project(scene: Scene) -> Project:
    """Return a project with two jobs, of which the first ends when there is a file `go`."""
    project = Project(scene.folder, scene.cluster)
    shutil.copytree(ROOT / "profiles", project.folder / "profiles")
    text = SNAKEFILE.format(scripts=str(ROOT / "scripts"), rules=str(ROOT / "rules" / "cluster.smk"))
    (project.folder / "Snakefile").write_text(textwrap.dedent(text))
    return project


def submit(project: Project) -> str:
    """Submit the controller as docs/cluster.md says, and return the job's number."""
    options = ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "2"]
    sbatch = ["sbatch", "--parsable", "profiles/slurm/controller.sh", "--slurm-no-account", *options]
    return project.cluster.run(*sbatch, cwd=project.folder).stdout.strip()


def state(project: Project, job: str) -> str:
    """SLURM's state of a job."""
    return project.cluster.run("squeue", "--states=all", "--noheader", f"--jobs={job}", "--format=%T").stdout.strip()


def report(project: Project) -> str:
    """What the controller printed so far."""
    log = project.folder / "controller.log"
    return log.read_text() if log.exists() else ""


def wait(project: Project, condition: Callable[[], object]) -> None:
    """Wait for a condition that comes true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, report(project)
        time.sleep(1)


@pytest.mark.parametrize("scenario", [goes_back_into_the_queue, ends_with_its_jobs])
def test_controller(played, scenario):
    passed(played[scenario.__name__])
