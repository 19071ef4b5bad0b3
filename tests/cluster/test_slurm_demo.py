"""The workflow's SLURM profile on a real, throwaway cluster of two nodes; no test here mocks a SLURM command."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from cluster.slurm import NODES, Cluster

pytestmark = pytest.mark.cluster

PROJECT = Path(__file__).resolve().parents[2]

# The throwaway cluster has no accounting, and its jobs take seconds: by the eighth, most have ended. When none has, the
# plugin waits ten seconds longer each time.
PROFILE = [
    *("--profile", PROJECT / "profiles" / "slurm"),
    *("--slurm-status-command", "squeue", "--slurm-no-account", "--slurm-init-seconds-before-status-checks", "8"),
]


@pytest.mark.parametrize("node", NODES)
def test_node_runs_a_job(cluster: Cluster, node: str):
    job = cluster.run("srun", "-w", node, "printenv", "SLURMD_NODENAME")
    assert job.stdout.strip() == node, job.stderr + cluster.logs()


def test_gpus_are_assigned(cluster: Cluster):
    job = cluster.run("srun", "--gpus=2", "printenv", "CUDA_VISIBLE_DEVICES")
    assert job.stdout.strip() == "0,1", job.stderr + cluster.logs()


def test_workflow_through_the_profile(cluster: Cluster, tmp_path: Path):
    # The folder's name must reach the jobs as it is.
    folder = tmp_path / 'my "$HOME"; {folder}'
    # Snakemake adds profiles/default beside a Snakefile to any other profile: the pair is what users get.
    shutil.copytree(PROJECT / "profiles" / "default", folder / "profiles" / "default")
    snakefile = """
        rule all:
            input: "n1.txt", "n2.txt"

        rule land:
            output: "{node}.txt"
            resources: gpu=1, slurm_extra=lambda wildcards: f"--nodelist={wildcards.node}"
            shell: 'echo "$SLURM_JOB_ID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES" > {output:q}'

        rule fail:
            output: "never.txt"
            shell: "exit 3"
    """
    (folder / "Snakefile").write_text(textwrap.dedent(snakefile))

    first = snakemake(cluster, folder, *PROFILE, "--retries", "0", "all", "never.txt")
    assert first.returncode == 1, report(cluster, first)
    assert first.stderr.count("status is: 'FAILED'") == 1, report(cluster, first)
    assert not (folder / "never.txt").exists()
    # The other jobs did not suffer, and each was a SLURM job of its own, on its node, with one GPU.
    landed = [(folder / f"{node}.txt").read_text().split() for node in NODES]
    job_ids, nodes, gpus = zip(*landed, strict=True)
    assert len(set(job_ids)) == 2
    assert (nodes, gpus) == (NODES, ("0", "0"))

    second = snakemake(cluster, folder, *PROFILE)
    assert second.returncode == 0, report(cluster, second)
    assert "Nothing to be done" in second.stderr


def snakemake(cluster: Cluster, folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """Run this interpreter's snakemake in `folder`, with the throwaway cluster as the only one it can see."""
    return cluster.run(sys.executable, "-m", "snakemake", *arguments, cwd=folder, timeout=300)


def report(cluster: Cluster, run: subprocess.CompletedProcess) -> str:
    """Return what a failed assertion should show: Snakemake's output and the daemons' logs."""
    return f"{run.stdout}\n{run.stderr}\n{cluster.logs()}"
