"""Jobs, nodes and controllers that end before their time: the same command finishes with the bytes of a run that
nothing happened to."""

import re

import pytest
from cluster.damage import it_caches, it_trains, kill_controller, kill_node, replace_sacct
from cluster.driving import ON_THE_CLUSTER, PICTURES, ROOT, SNAKEMAKE, STEPS, Project, Run, Scene, passed
from cluster.slurm import Cluster, throwaway_cluster

# one worker has the cluster, however many run the other tests
pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]


def cancelled(scene: Scene):
    """scancel of a caching job, then of a training: what they had done by then is not done again."""
    project = scene.copy().forget_latents()
    for rule, until in (("cache_latents", it_caches), ("train", it_trains)):
        run = project.start("--retries", "0")
        with until(run):
            project.cluster.run("scancel", *project.jobs(rule, "running"))
        assert run.wait() == 1, run.report()
    encoded, up_to_date = _encoded(project)
    assert encoded and up_to_date and encoded + up_to_date == PICTURES / 2, run.report()

    again = project.run()
    assert _went_on_after(project) >= 2
    assert project.hashes() == scene.finished().hashes(), again.report()


def nodes_failed(scene: Scene):
    """A node that loses its power while it caches, and one while it trains and starts again at once."""
    with throwaway_cluster(node_timeout=15) as cluster:
        project = scene.copy(cluster).forget_latents()
        run = project.start()
        with it_caches(run):
            caching = _node(project, "cache_latents")
            kill_node(cluster, caching)
        with it_trains(run, steps=6):
            training = _node(project, "train")
            kill_node(cluster, training)
        assert training != caching
        cluster.start_node(caching)
        cluster.start_node(training)
        assert run.wait() == 0, run.report()
        encoded, up_to_date = _encoded(project)
        assert encoded and up_to_date and encoded + up_to_date == PICTURES / 2, run.report()
        assert _went_on_after(project) == 4, "the last state that was saved"
        assert project.hashes() == scene.finished().hashes(), run.report()


def controller_killed(scene: Scene):
    """Snakemake killed while a job caches, and while one trains: the next one waits for the job, repeats nothing."""
    project = scene.copy().forget_latents()
    run = project.start()
    for until in (it_caches, it_trains):
        with until(run):
            run = _start_another(run)
    assert run.wait() == 0, run.report()
    assert _encoded(project) == (0, PICTURES / 2)
    assert "is finished; nothing to do" in project.log("train/demo.log")
    assert project.hashes() == scene.finished().hashes(), run.report()


def slurm_does_not_answer(scene: Scene):
    """slurmctld killed while a job runs, and sacct out of order: nobody forgets the job."""
    with throwaway_cluster() as cluster:
        project = _patient(scene, cluster)
        asked, out_of_order = replace_sacct(cluster)
        # ten times faster than people should ask
        options = ["--slurm-status-command", "sacct", "--max-status-checks-per-second", "1"]
        run = Run(project, [*SNAKEMAKE, *ON_THE_CLUSTER, *options])
        run.until((project.folder / "begun").exists)
        out_of_order.touch()
        kill_controller(cluster)
        asked.unlink(missing_ok=True)
        # more failures in a row than the plugin takes by itself
        run.until(lambda: asked.exists() and len(asked.read_text()) > 7)
        cluster.start_controller()
        out_of_order.unlink()
        (project.folder / "go").touch()
        assert run.wait() == 0, run.report()
        assert (project.folder / "begun").read_text() == "begun\n"


def slurm_forgets(scene: Scene):
    """slurmctld killed before it saved a job that runs: nobody waits for it forever, it is submitted again."""
    with throwaway_cluster() as cluster:
        project = _patient(scene, cluster)
        run = Run(project, [*SNAKEMAKE, *ON_THE_CLUSTER])
        run.until((project.folder / "begun").exists)
        kill_controller(cluster, remembers=False)
        cluster.start_controller()
        run.until(lambda: (project.folder / "begun").read_text() == "begun\n" * 2)
        (project.folder / "go").touch()
        assert run.wait() == 0, run.report()
        assert "SLURM does not know job 1 any more" in run.text()


def _patient(scene: Scene, cluster: Cluster) -> Project:
    """Return a project of which the one job ends when there is a file `go`, under the rules that all jobs are under."""
    project = Project(scene.folder, cluster)
    (project.folder / "Snakefile").write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        f"include: {str(ROOT / 'rules/cluster.smk')!r}\n"
        'rule patient:\n    output: "end"\n'
        '    shell: "echo begun >> begun; while [ ! -e go ]; do sleep 0.2; done; touch {output}"\n'
    )
    return project


def _start_another(run: Run) -> Run:
    """Kill a Snakemake and start another, which sees the job of the first; return it."""
    run.process.kill()
    run.process.wait()
    unlock = run.project.start("--unlock")
    assert unlock.wait() == 0, unlock.report()
    another = run.project.start()
    another.until(lambda: "Jobs of an earlier run are still in the queue" in another.text())
    return another


def _node(project: Project, rule: str) -> str:
    """Return the node on which the rule's job runs."""
    (job,) = project.jobs(rule, "running")
    return project.cluster.facts(job)["NodeList"]


def _encoded(project: Project) -> tuple[int, ...]:
    """Return how many latents the first shard's last job encoded, and how many it found."""
    (counts,) = re.findall(r": (\d+) encoded, (\d+) up to date", project.log("cache_latents/dataset/1-of-2.log"))
    return tuple(map(int, counts))


def _went_on_after(project: Project) -> int:
    """Return the step after which the last training went on."""
    return int(re.findall(rf"going on after step (\d+) of {STEPS}", project.log("train/demo.log"))[0])


@pytest.mark.parametrize("scenario", [cancelled, nodes_failed, controller_killed, slurm_does_not_answer, slurm_forgets])
def test_interrupted(played, scenario):
    passed(played[scenario.__name__])
