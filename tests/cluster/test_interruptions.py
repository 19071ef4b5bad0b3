"""Jobs, nodes and controllers that end before their time: the same command finishes with the bytes of a run that
nothing happened to."""

import pytest
from cluster.damage import frozen, kill_controller, kill_node, replace_sacct, stage_processes
from cluster.driving import STEPS, Scene
from cluster.slurm import throwaway_cluster

# one worker has the cluster, however many run the other tests
pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]

CACHING = "qwen_image_cache_latents.py"
TRAINING = "qwen_image_train_network.py"
PICTURES = 18


def cancelled(scene: Scene):
    """scancel of a caching job, and of a training twice: Snakemake tries once more by itself, then the user does."""
    project = scene.copy().forget_latents()
    cached = project.latents()
    run = project.start()
    run.until(lambda: cached < project.latents() < PICTURES)
    project.cluster.run("scancel", *project.jobs("cache_latents", "running"))
    for wanted in (4, 8):
        run.until(lambda wanted=wanted: project.steps() >= wanted and project.jobs("train", "running"))
        project.cluster.run("scancel", *project.jobs("train", "running"))
        run.until(lambda: not project.jobs("train", "running"))
    assert run.wait() == 1, run.report()
    assert len(project.jobs("cache_latents")) == len(project.jobs("train")) == 2
    assert f"of {STEPS}" in project.log("train/demo.log")

    again = project.run()
    assert "going on after step" in project.log("train/demo.log")
    assert project.hashes() == scene.finished().hashes(), again.report()


def nodes_failed(scene: Scene):
    """A node that loses its power while it caches, and one while it trains and starts again at once."""
    with throwaway_cluster(node_timeout=15) as cluster:
        project = scene.copy(cluster).forget_latents()
        cached = project.latents()
        run = project.start()
        run.until(lambda: cached < project.latents() < PICTURES)
        (job,) = project.jobs("cache_latents", "running")
        caching = cluster.facts(job)["NodeList"]
        kill_node(cluster, caching)
        run.until(lambda: project.steps() >= 6)
        (job,) = project.jobs("train", "running")
        training = cluster.facts(job)["NodeList"]
        assert training != caching
        kill_node(cluster, training)
        cluster.start_node(caching)
        cluster.start_node(training)
        assert run.wait() == 0, run.report()
        assert "going on after step 4 of" in project.log("train/demo.log")
        assert project.hashes() == scene.finished().hashes(), run.report()


def controller_killed(scene: Scene):
    """Snakemake killed while a job caches, and while one trains: the next one waits for the job, repeats nothing."""
    project = scene.copy().forget_latents()
    cached = project.latents()
    run = project.start()
    run.until(lambda: cached < project.latents() < PICTURES)
    with frozen(stage_processes(project.cluster, project.folder, CACHING)):
        again = _start_another(project, run)
    again.until(lambda: project.steps() >= 2)
    with frozen(stage_processes(project.cluster, project.folder, TRAINING)):
        last = _start_another(project, again)
    assert last.wait() == 0, last.report()
    assert project.hashes() == scene.finished().hashes(), last.report()


def slurm_does_not_answer(scene: Scene):
    """slurmctld killed while a job trains, and sacct out of order for longer: nobody forgets the job."""
    with throwaway_cluster() as cluster:
        project = scene.copy(cluster).forget_training()
        asked, out_of_order = replace_sacct(cluster)
        # ten times faster than people should ask
        run = project.start("--slurm-status-command", "sacct", "--max-status-checks-per-second", "1")
        run.until(lambda: project.steps() >= 2)
        out_of_order.touch()
        kill_controller(cluster)
        asked.unlink(missing_ok=True)
        # more failures in a row than the plugin takes by itself
        run.until(lambda: asked.exists() and len(asked.read_text()) > 7)
        cluster.start_controller()
        out_of_order.unlink()
        assert run.wait() == 0, run.report()
        assert len(project.jobs("train")) == 1, run.report()
        assert project.hashes() == scene.finished().hashes(), run.report()


def _start_another(project, run):
    """Kill a Snakemake and start another, which sees the jobs of the first; return it."""
    run.process.kill()
    run.process.wait()
    unlock = project.start("--unlock")
    assert unlock.wait() == 0, unlock.report()
    another = project.start()
    another.until(lambda: "Jobs of an earlier run are still in the queue" in another.text())
    return another


@pytest.mark.parametrize("scenario", [cancelled, nodes_failed, controller_killed, slurm_does_not_answer])
def test_interrupted(played, scenario):
    played[scenario.__name__].result()
