"""Snakemake as a SLURM job: when its time is up it goes back into the queue, and on with the jobs it has left."""

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
    project = Project(scene.folder, scene.cluster)
    shutil.copytree(ROOT / "profiles", project.folder / "profiles")
    text = SNAKEFILE.format(scripts=str(ROOT / "scripts"), rules=str(ROOT / "rules" / "cluster.smk"))
    (project.folder / "Snakefile").write_text(textwrap.dedent(text))
    options = ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "2"]
    controller = submit(project, "--slurm-no-account", *options)
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


def submit(project: Project, *options: str) -> str:
    """Submit the controller as docs/cluster.md says, and return the job's number."""
    sbatch = ["sbatch", "--parsable", "profiles/slurm/controller.sh", *options]
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


@pytest.mark.parametrize("scenario", [goes_back_into_the_queue])
def test_controller(played, scenario):
    passed(played[scenario.__name__])
