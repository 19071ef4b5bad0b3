"""The workflow's SLURM profile on a real, throwaway cluster of two nodes; no test here mocks a SLURM command."""

import shutil
import textwrap
from datetime import datetime

import pytest
from cluster.damage import path_without
from cluster.driving import ON_THE_CLUSTER, ROOT, SNAKEMAKE, Project, Run, Scene, passed
from cluster.slurm import NODES, Cluster, throwaway_cluster

# one worker has the cluster, however many run the other tests
pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("cluster")]

RATES = {"demo": "", "fast": 0.01, "slow": 0.0001, "slower": 0.00001}
"""By name; the first is the one that was trained without SLURM."""


@pytest.mark.parametrize("node", NODES)
def test_node_runs_a_job(cluster: Cluster, node: str):
    job = cluster.run("srun", "-w", node, "printenv", "SLURMD_NODENAME")
    assert job.stdout.strip() == node, job.stderr + cluster.logs()


def test_gpus_are_assigned(cluster: Cluster):
    job = cluster.run("srun", "--gpus=2", "printenv", "CUDA_VISIBLE_DEVICES")
    assert job.stdout.strip() == "0,1", job.stderr + cluster.logs()


def two_jobs_and_a_failure(scene: Scene):
    """The profile with a workflow of its own."""
    # The folder's name must reach the jobs as it is.
    project = Project(scene.folder / 'my "$HOME"; {folder}', scene.cluster)
    # Snakemake adds profiles/default beside a Snakefile to any other profile: the pair is what users get.
    shutil.copytree(ROOT / "profiles" / "default", project.folder / "profiles" / "default")
    snakefile = """
        rule all:
            input: "n1.txt", "n2.txt"

        rule land:
            output: "{node}.txt"
            resources: gpu=2, local_gpu=2, slurm_extra=lambda wildcards: f"--nodelist={wildcards.node}"
            shell: 'echo "$SLURM_JOB_ID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES" > {output:q}'

        rule fail:
            output: "never.txt"
            shell: "exit 3"
    """
    (project.folder / "Snakefile").write_text(textwrap.dedent(snakefile))
    first = Run(project, [*SNAKEMAKE, *ON_THE_CLUSTER, "--retries", "0", "all", "never.txt"])
    assert first.wait() == 1, first.report()
    assert first.text().count("status is: 'FAILED'") == 1, first.report()
    assert not (project.folder / "never.txt").exists()
    # The other jobs did not suffer, and each was a SLURM job of its own, on its node, with the GPUs it asked for.
    landed = [(project.folder / f"{node}.txt").read_text().split() for node in NODES]
    job_ids, nodes, gpus = zip(*landed, strict=True)
    assert len(set(job_ids)) == 2
    assert (nodes, gpus) == (NODES, ("0,1", "0,1"))

    second = Run(project, [*SNAKEMAKE, *ON_THE_CLUSTER])
    assert second.wait() == 0, second.report()
    assert "Nothing to be done" in second.text(), second.report()


def four_runs(scene: Scene):
    """From nothing to four LoRAs on both nodes, where no sacct is installed: every cached file, and the LoRA that was
    trained on one machine too, byte by byte as there; the trainings at the same time."""
    with throwaway_cluster() as cluster:
        project = Project(scene.folder / "project", cluster)
        project.env |= {"PATH": path_without(cluster, "sacct", scene.folder / "bin")}
        project.configure(runs="runs.tsv")
        rows = ["output_name\tlearning_rate", *(f"{name}\t{rate}" for name, rate in RATES.items())]
        (project.folder / "runs.tsv").write_text("\n".join(rows) + "\n")
        run = project.run()

        made, alone = project.hashes(), scene.finished().hashes()
        assert {name: made.get(name) for name in alone} == alone, run.report()
        loras = [made[f"models/{name}.safetensors"] for name in RATES]
        assert len(set(loras)) == len(RATES)
        caching = [job for rule in ("cache_latents", "cache_text_encoder_outputs") for job in project.jobs(rule)]
        assert len(caching) == 4
        assert {cluster.facts(job)["NodeList"] for job in caching} == set(NODES)
        trainings = [cluster.facts(job) for job in project.jobs("train")]
        assert len(trainings) == len(RATES)
        starts, ends = ([datetime.fromisoformat(job[time]) for job in trainings] for time in ("StartTime", "EndTime"))
        assert max(starts) < min(ends), run.report()

        again = project.run()
        assert "Nothing to be done" in again.text(), again.report()


@pytest.mark.parametrize("scenario", [two_jobs_and_a_failure, four_runs])
def test_profile(played, scenario):
    passed(played[scenario.__name__])
